//! References of images in registries: `debian:12`, `localhost:5000/team/app@sha256:...`.

use crate::digest::{Digest, InvalidDigest};
use std::fmt::{self, Display, Formatter};
use std::net::{Ipv4Addr, Ipv6Addr};

/// The registry of references without one.
const DEFAULT_HOST: &str = "docker.io";
const DEFAULT_SERVER: &str = "registry-1.docker.io";

/// A reference of an image in a registry.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Reference {
    /// The host of the registry, with the port if the reference has one.
    pub(crate) host: String,
    /// The name of the repository.
    pub(crate) repository: String,
    pub(crate) version: Version,
}

/// The tag or digest of an image in its repository.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Version {
    Tag(String),
    Digest(Digest),
}

/// Why a text is not a reference.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The name of the repository is invalid.
    #[error("{0:?} is not a repository name: lower-case letters, digits, and . _ - / between them")]
    Name(String),
    /// The host is invalid.
    #[error("{0:?} is not a registry: HOST or HOST:PORT")]
    Host(String),
    /// The tag is invalid.
    #[error("{0:?} is not a tag: letters, digits and _ . -, at most 128")]
    Tag(String),
    /// The digest is invalid.
    #[error(transparent)]
    Digest(#[from] InvalidDigest),
}

impl Reference {
    pub(crate) fn parse(text: &str) -> Result<Self, Error> {
        let (rest, digest) = match text.split_once('@') {
            Some((rest, digest)) => (rest, Some(digest.parse()?)),
            None => (text, None),
        };
        // As in docker, the first component is a host if it has a dot or a port, or is `localhost`.
        let (host, path) = match rest.split_once('/') {
            Some((host, path)) if host.contains(['.', ':']) || host == "localhost" => (host, path),
            _ => (DEFAULT_HOST, rest),
        };
        let (name, tag) = path.split_once(':').map_or((path, None), |(name, tag)| (name, Some(tag)));
        let tag = tag.unwrap_or("latest");
        if !is_host(host) {
            return Err(Error::Host(host.to_owned()));
        }
        if !is_name(name) {
            return Err(Error::Name(name.to_owned()));
        }
        if !is_tag(tag) {
            return Err(Error::Tag(tag.to_owned()));
        }
        let library = if host == DEFAULT_HOST && !name.contains('/') { "library/" } else { "" };
        // A digest takes precedence over a tag.
        let version = digest.map_or_else(|| Version::Tag(tag.to_owned()), Version::Digest);
        Ok(Self { host: host.to_owned(), repository: format!("{library}{name}"), version })
    }

    /// The URL of the repository. Only the loopback interface is accessed without TLS.
    pub(crate) fn url(&self) -> String {
        let server = if self.host == DEFAULT_HOST { DEFAULT_SERVER } else { &self.host };
        let scheme = if is_loopback(server) { "http" } else { "https" };
        format!("{scheme}://{server}/v2/{}", self.repository)
    }

    pub(crate) fn is_loopback(&self) -> bool {
        is_loopback(&self.host)
    }
}

impl Display for Reference {
    fn fmt(&self, formatter: &mut Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}/{}", self.host, self.repository)?;
        match &self.version {
            Version::Tag(tag) => write!(formatter, ":{tag}"),
            Version::Digest(digest) => write!(formatter, "@{digest}"),
        }
    }
}

/// Removes the port of a host.
fn without_port(host: &str) -> &str {
    match host.strip_prefix('[').and_then(|inner| inner.split_once(']')) {
        Some((address, _)) => address,
        None => host.split_once(':').map_or(host, |(host, _)| host),
    }
}

/// Whether a host, with or without a port, is the loopback interface.
pub(crate) fn is_loopback(host: &str) -> bool {
    let host = without_port(host);
    host == "localhost"
        || host.parse::<Ipv4Addr>().is_ok_and(|address| address.is_loopback())
        || host.parse::<Ipv6Addr>().is_ok_and(|address| address.is_loopback())
}

fn is_host(host: &str) -> bool {
    let bare = without_port(host);
    let is_six = bare.parse::<Ipv6Addr>().is_ok();
    let port = match host.strip_prefix('[') {
        Some(inner) if is_six => inner[bare.len() + 1..].to_owned(),
        Some(_) => return false,
        None => host[bare.len()..].to_owned(),
    };
    let is_port = port.is_empty() || port.strip_prefix(':').is_some_and(|port| port.parse::<u16>().is_ok());
    let is_letter = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-');
    is_port && (is_six || (!bare.is_empty() && bare.bytes().all(is_letter)))
}

fn is_name(name: &str) -> bool {
    let is_plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let is_part = |part: &str| {
        part.bytes().all(|byte| is_plain(byte) || matches!(byte, b'.' | b'_' | b'-'))
            && part.bytes().next().is_some_and(is_plain)
            && part.bytes().last().is_some_and(is_plain)
    };
    name.len() <= 255 && name.split('/').all(is_part)
}

fn is_tag(tag: &str) -> bool {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    (1..=128).contains(&tag.len())
        && tag.bytes().next().is_some_and(is_plain)
        && tag.bytes().all(|byte| is_plain(byte) || matches!(byte, b'.' | b'-'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_are_parsed_as_docker_parses_them() {
        let digest = Digest::of(b"");
        for (text, shown, url) in [
            ("debian", "docker.io/library/debian:latest", "https://registry-1.docker.io/v2/library/debian"),
            ("debian:12", "docker.io/library/debian:12", "https://registry-1.docker.io/v2/library/debian"),
            ("team/app", "docker.io/team/app:latest", "https://registry-1.docker.io/v2/team/app"),
            ("quay.io/a/b/c:v1", "quay.io/a/b/c:v1", "https://quay.io/v2/a/b/c"),
            ("localhost/x", "localhost/x:latest", "http://localhost/v2/x"),
            ("localhost:5000/x/y:z", "localhost:5000/x/y:z", "http://localhost:5000/v2/x/y"),
            ("127.8.9.1:80/x", "127.8.9.1:80/x:latest", "http://127.8.9.1:80/v2/x"),
            ("[::1]:5000/x", "[::1]:5000/x:latest", "http://[::1]:5000/v2/x"),
            ("128.0.0.1:5000/x", "128.0.0.1:5000/x:latest", "https://128.0.0.1:5000/v2/x"),
            (
                "localhost.example.org/x",
                "localhost.example.org/x:latest",
                "https://localhost.example.org/v2/x",
            ),
            (
                "127.0.0.1.example.org/x",
                "127.0.0.1.example.org/x:latest",
                "https://127.0.0.1.example.org/v2/x",
            ),
        ] {
            let reference = Reference::parse(text).unwrap();
            assert_eq!((&*reference.to_string(), &*reference.url()), (shown, url));
        }
        let reference = Reference::parse(&format!("a.b/c:tag@{digest}")).unwrap();
        assert_eq!(reference.to_string(), format!("a.b/c@{digest}"));
    }

    #[test]
    fn other_texts_are_not_references() {
        for text in [
            "",
            "Debian",
            "debian:",
            "debian:a/b",
            "debian:a b",
            "a//b",
            "a/../b",
            "-a",
            "a.b/",
            "a_/b",
            "a?b",
            "a%2e",
            "host.x:port/x",
            "user@host.x/x",
            "[::1/x",
            "[a.b]/x",
            ":5000/x",
            "a.b:/x",
            "x@sha256:12",
        ] {
            assert!(Reference::parse(text).is_err(), "{text}");
        }
    }
}
