//! A client for the OCI distribution specification, for one repository. Layers are read as a stream, which is converted
//! while it is downloaded; the blobs are not stored.

use crate::digest::Digest;
use crate::json;
use crate::manifest::{DOCKER_INDEX, DOCKER_MANIFEST, MAX_DOCUMENT, OCI_INDEX, OCI_MANIFEST};
use crate::reference::{Reference, is_loopback};
use serde::Deserialize;
use std::collections::HashMap;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use ureq::http::Response;
use ureq::tls::{PemItem, RootCerts, TlsConfig, parse_pem};
use ureq::{Agent, Body, BodyReader, Proxy};

/// The files in which distributions keep the trusted certificates.
const SYSTEM_ROOTS: [&str; 3] =
    ["/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem"];
/// The files by which the C library resolves names.
const RESOLVER: [&str; 5] =
    ["/etc/resolv.conf", "/etc/hosts", "/etc/nsswitch.conf", "/etc/host.conf", "/etc/gai.conf"];
/// The timeout for connecting, for the response headers and for each read.
const TIMEOUT: Duration = Duration::from_secs(60);
/// How often an interrupted download is resumed.
const MAX_RESUMES: u32 = 5;

/// Why a request to a registry failed.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// The connection failed.
    #[error("request to {url} failed")]
    Request {
        /// The URL of the request.
        url: String,
        /// The cause.
        #[source]
        source: Box<ureq::Error>,
    },
    /// The registry does not have the image or blob.
    #[error("not found in the registry {0}")]
    NotFound(String),
    /// The registry requires a login.
    #[error("access denied by {0}, or the image does not exist; log in with `docker login {0}`")]
    Denied(String),
    /// The registry returned an unexpected status.
    #[error("{host} returned status {status} for {url}")]
    Status {
        /// The registry.
        host: String,
        /// The HTTP status.
        status: u16,
        /// The URL of the request.
        url: String,
    },
    /// The trusted certificates cannot be loaded.
    #[error("cannot load the trusted certificates in {path}, from SSL_CERT_FILE or the system")]
    Certificates {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The token service does not use TLS.
    #[error("the token service {1} of {0} does not use TLS")]
    Realm(String, String),
}

impl RegistryError {
    pub(crate) const fn is_user_error(&self) -> bool {
        matches!(self, Self::NotFound(_) | Self::Denied(_))
    }
}

/// A client for the repository of one image.
#[derive(Debug)]
pub(crate) struct Registry {
    pub(crate) reference: Reference,
    agent: Agent,
    /// The value of the header `Authorization`, once a challenge was answered.
    authorization: Mutex<Option<String>>,
}

impl Registry {
    pub(crate) fn new(reference: Reference) -> Result<Self, RegistryError> {
        let is_loopback = reference.is_loopback();
        // Requests to the loopback interface do not use TLS.
        let roots = if is_loopback { RootCerts::WebPki } else { roots(own_roots())? };
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .proxy(if is_loopback { None } else { Proxy::try_from_env() })
            .https_only(!is_loopback)
            .tls_config(TlsConfig::builder().root_certs(roots).build())
            .timeout_connect(Some(TIMEOUT))
            .timeout_recv_response(Some(TIMEOUT))
            .timeout_per_read(Some(TIMEOUT))
            .user_agent(concat!("kindling/", env!("CARGO_PKG_VERSION")))
            .build();
        Ok(Self { reference, agent: config.into(), authorization: Mutex::default() })
    }

    fn authorization(&self) -> MutexGuard<'_, Option<String>> {
        self.authorization.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts the download of a layer.
    pub(crate) fn download(&self, digest: Digest) -> Result<Download<'_>, RegistryError> {
        let path = format!("blobs/{digest}");
        let body = self.get(&path, false, 0)?.into_body().into_reader();
        Ok(Download { registry: self, path, body, position: 0, resumes: 0 })
    }

    /// Requests a path of the repository from a byte on. If the registry requires authorization, the request is
    /// repeated with it.
    pub(crate) fn get(
        &self,
        path: &str,
        is_manifest: bool,
        from: u64,
    ) -> Result<Response<Body>, RegistryError> {
        let url = format!("{}/{path}", self.reference.url());
        let send = || {
            let mut request = self.agent.get(&url);
            if is_manifest {
                request = request
                    .header("Accept", [OCI_INDEX, OCI_MANIFEST, DOCKER_INDEX, DOCKER_MANIFEST].join(", "));
            }
            if let Some(authorization) = &*self.authorization() {
                request = request.header("Authorization", authorization);
            }
            if from > 0 {
                request = request.header("Range", format!("bytes={from}-"));
            }
            request
                .call()
                .map_err(|source| RegistryError::Request { url: url.clone(), source: Box::new(source) })
        };
        let mut response = send()?;
        if response.status() == 401 {
            let challenge = response.headers().get("www-authenticate").and_then(|value| value.to_str().ok());
            let authorization = self.authorize(challenge.unwrap_or_default())?;
            *self.authorization() = Some(authorization);
            response = send()?;
        }
        let expected = if from > 0 { 206 } else { 200 };
        match response.status().as_u16() {
            status if status == expected => Ok(response),
            404 => Err(RegistryError::NotFound(self.reference.host.clone())),
            401 | 403 => Err(RegistryError::Denied(self.reference.host.clone())),
            status => Err(RegistryError::Status { host: self.reference.host.clone(), status, url }),
        }
    }

    /// The value of the header `Authorization` for a challenge (RFC 9110, 11.6.1): a token, or name and password.
    fn authorize(&self, challenge: &str) -> Result<String, RegistryError> {
        let host = || self.reference.host.clone();
        let password = password(&self.reference.host);
        let basic = password.map(|password| format!("Basic {password}"));
        let Some(parameters) = strip_scheme(challenge, "bearer") else {
            return basic.ok_or_else(|| RegistryError::Denied(host()));
        };
        let parameters = parameters_of(parameters);
        let realm = parameters.get("realm").ok_or_else(|| RegistryError::Denied(host()))?;
        let is_local = self.reference.is_loopback() && is_on_loopback(realm);
        if !realm.starts_with("https://") && !is_local {
            return Err(RegistryError::Realm(host(), realm.clone()));
        }
        let mut request = self.agent.get(realm);
        for name in ["service", "scope"] {
            if let Some(value) = parameters.get(name) {
                request = request.query(name, value);
            }
        }
        if let Some(basic) = basic {
            request = request.header("Authorization", basic);
        }
        let failed =
            |source: ureq::Error| RegistryError::Request { url: realm.clone(), source: Box::new(source) };
        let mut response = request.call().map_err(failed)?;
        match response.status().as_u16() {
            200 => {}
            401 | 403 => return Err(RegistryError::Denied(host())),
            status => return Err(RegistryError::Status { host: host(), status, url: realm.clone() }),
        }
        let mut content = Vec::new();
        response
            .body_mut()
            .as_reader()
            .take(MAX_DOCUMENT)
            .read_to_end(&mut content)
            .map_err(|error| failed(error.into()))?;
        let token: Option<Token> = json::parse(&content).ok();
        let token = token.and_then(|token| token.token.or(token.access_token));
        Ok(format!("Bearer {}", token.ok_or_else(|| RegistryError::Denied(host()))?))
    }
}

#[derive(Deserialize)]
struct Token {
    token: Option<String>,
    access_token: Option<String>,
}

/// Whether a URL without TLS is on the loopback interface.
fn is_on_loopback(url: &str) -> bool {
    let rest = url.strip_prefix("http://").unwrap_or_default();
    let host = rest.split(['/', '?', '#']).next().unwrap_or_default();
    !host.contains('@') && is_loopback(host)
}

fn strip_scheme<'a>(challenge: &'a str, scheme: &str) -> Option<&'a str> {
    let (found, parameters) = challenge.trim().split_once(' ')?;
    found.eq_ignore_ascii_case(scheme).then_some(parameters)
}

/// Parses the parameters of a challenge: `a="b",c="d"`.
fn parameters_of(text: &str) -> HashMap<String, String> {
    let mut found = HashMap::new();
    let mut rest = text;
    while let Some((name, after)) = rest.split_once('=') {
        let name = name.trim_matches([',', ' ']).to_ascii_lowercase();
        let (value, later) = match after.strip_prefix('"') {
            Some(quoted) => quoted.split_once('"').unwrap_or((quoted, "")),
            None => after.split_once(',').unwrap_or((after, "")),
        };
        found.insert(name, value.to_owned());
        rest = later;
    }
    found
}

/// Name and password for a registry, in base64, from the files of `docker login` and `podman login`.
fn password(host: &str) -> Option<String> {
    #[derive(Deserialize)]
    struct Auth {
        auth: Option<String>,
    }
    #[derive(Deserialize)]
    struct Logins {
        #[serde(default)]
        auths: HashMap<String, Auth>,
    }
    let names = match host {
        "docker.io" => ["https://index.docker.io/v1/".to_owned(), host.to_owned()],
        host => [host.to_owned(), format!("https://{host}")],
    };
    login_files().find_map(|file| {
        let mut logins: Logins = json::parse(&std::fs::read(file).ok()?).ok()?;
        names.iter().find_map(|name| logins.auths.remove(name)?.auth).filter(|auth| !auth.is_empty())
    })
}

/// The files of `docker login` and `podman login`.
fn login_files() -> impl Iterator<Item = PathBuf> {
    let variable = |name| std::env::var_os(name).map(PathBuf::from);
    let docker = variable("DOCKER_CONFIG").or_else(|| Some(variable("HOME")?.join(".docker")));
    let podman = variable("XDG_RUNTIME_DIR");
    let files =
        [docker.map(|path| path.join("config.json")), podman.map(|path| path.join("containers/auth.json"))];
    files.into_iter().flatten()
}

/// The certificate file that the user names.
fn own_roots() -> Option<PathBuf> {
    std::env::var_os("SSL_CERT_FILE").filter(|path| !path.is_empty()).map(PathBuf::from)
}

/// The files that a client may read.
pub(crate) fn files() -> Vec<PathBuf> {
    let fixed = SYSTEM_ROOTS.iter().chain(&RESOLVER).map(PathBuf::from);
    login_files().chain(own_roots()).chain(fixed).collect()
}

/// The trusted certificates: those in the file of SSL_CERT_FILE, else the system's, else Mozilla's, which are compiled
/// in. If a file exists and cannot be loaded, that is an error; the next source is not tried.
fn roots(own: Option<PathBuf>) -> Result<RootCerts, RegistryError> {
    if let Some(path) = own {
        let text = std::fs::read(&path);
        return certificates(&path, text);
    }
    for path in SYSTEM_ROOTS {
        match std::fs::read(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            text => return certificates(Path::new(path), text),
        }
    }
    Ok(RootCerts::WebPki)
}

fn certificates(path: &Path, text: io::Result<Vec<u8>>) -> Result<RootCerts, RegistryError> {
    let failed = |source| RegistryError::Certificates { path: path.into(), source };
    let text = text.map_err(failed)?;
    let items = parse_pem(&text).filter_map(|item| match item {
        Ok(PemItem::Certificate(certificate)) => Some(Ok(certificate)),
        Ok(_) => None,
        Err(error) => Some(Err(io::Error::other(error))),
    });
    let certificates = items.collect::<io::Result<Vec<_>>>().map_err(failed)?;
    if certificates.is_empty() {
        return Err(failed(io::Error::other("no certificate in the file")));
    }
    Ok(RootCerts::Specific(Arc::new(certificates)))
}

/// The download of a layer, which is resumed when it is interrupted.
pub(crate) struct Download<'a> {
    registry: &'a Registry,
    path: String,
    body: BodyReader<'static>,
    position: u64,
    resumes: u32,
}

/// An error of the network during a download, as distinct from a damaged layer.
#[derive(Debug, thiserror::Error)]
#[error("the download was interrupted {0} times")]
pub(crate) struct DownloadInterrupted(u32, #[source] io::Error);

impl Read for Download<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.body.read(buffer) {
                Ok(length) => {
                    self.position += length as u64;
                    return Ok(length);
                }
                Err(error) if self.resumes == MAX_RESUMES => {
                    return Err(io::Error::other(DownloadInterrupted(self.resumes + 1, error)));
                }
                Err(error) => {
                    self.resumes += 1;
                    match self.registry.get(&self.path, false, self.position) {
                        Ok(response) => self.body = response.into_body().into_reader(),
                        Err(_) => return Err(io::Error::other(DownloadInterrupted(self.resumes, error))),
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passwords_without_tls_stay_on_this_machine() {
        for url in ["http://localhost/token", "http://127.0.0.1:5000?a=b", "http://[::1]:5000/t"] {
            assert!(is_on_loopback(url), "{url}");
        }
        for url in [
            "http://example.org/localhost",
            "http://localhost@example.org/",
            "http://localhost:1@example.org/",
            "http://localhost.example.org",
            "ftp://localhost/",
            "localhost",
            "",
        ] {
            assert!(!is_on_loopback(url), "{url}");
        }
    }

    #[test]
    fn challenges_are_parsed() {
        let challenge =
            r#"Bearer realm="https://auth.x/token",service="x", scope="repository:a/b:pull,push""#;
        let found = parameters_of(strip_scheme(challenge, "bearer").unwrap());
        let is = |name, value: &str| assert_eq!(found.get(name).map(String::as_str), Some(value));
        is("realm", "https://auth.x/token");
        is("service", "x");
        is("scope", "repository:a/b:pull,push");
        assert_eq!(strip_scheme(r#"Basic realm="x""#, "bearer"), None);
        assert_eq!(parameters_of("a=b,c=\"d").len(), 2);
    }
}
