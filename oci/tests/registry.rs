//! A registry that requires tokens, redirects, interrupts downloads and sends wrong answers.

mod support;

use kindling_oci::{Cache, Digest, Options, Prepared, Pull, prepare};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::error::Error as _;
use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;
use support::{Layer, Packing, Workspace};

/// The answer to a request.
#[derive(Clone)]
struct Answer {
    status: u16,
    headers: Vec<(String, String)>,
    body: Vec<u8>,
    /// The number of bytes after which the first connection is closed.
    broken_at: Option<usize>,
    /// The token that is required.
    token: Option<String>,
}

impl Answer {
    fn new(status: u16, content_type: &str, body: Vec<u8>) -> Self {
        let headers = vec![("Content-Type".to_owned(), content_type.to_owned())];
        Self { status, headers, body, broken_at: None, token: None }
    }
}

/// The requested paths, with the header `Authorization`.
type Asked = Mutex<Vec<(String, Option<String>)>>;

/// A server on the loopback interface, which ends with the test program.
struct Server {
    address: String,
    answers: Arc<Mutex<HashMap<String, Answer>>>,
    asked: Arc<Asked>,
}

impl Server {
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let server = Self { address, answers: Arc::default(), asked: Arc::default() };
        let (answers, asked) = (Arc::clone(&server.answers), Arc::clone(&server.asked));
        let host = server.address.clone();
        thread::spawn(move || {
            for stream in listener.incoming() {
                serve(stream.unwrap(), &host, &answers, &asked);
            }
        });
        server
    }

    fn put(&self, path: &str, answer: Answer) {
        self.answers.lock().unwrap().insert(path.to_owned(), answer);
    }

    fn change(&self, path: &str, change: impl FnOnce(&mut Answer)) {
        change(self.answers.lock().unwrap().get_mut(path).unwrap());
    }

    fn asked(&self) -> Vec<String> {
        self.asked.lock().unwrap().drain(..).map(|(path, _)| path).collect()
    }

    /// Adds an image with one layer as `x:1`, and returns the paths of its manifest and its layer.
    fn image(&self, content: &str) -> (String, String) {
        let layer = Packing::Gzip.pack(&Layer::new().file("name", content).bytes());
        let blob = |media_type: &str, body: &[u8]| {
            let digest = Digest::of(body).to_string();
            self.put(
                &format!("/v2/x/blobs/{digest}"),
                Answer::new(200, "application/octet-stream", body.to_vec()),
            );
            json!({ "mediaType": media_type, "digest": digest, "size": body.len() })
        };
        let config = json!({
            "architecture": "amd64", "os": "linux", "rootfs": { "diff_ids": [Digest::of(b"")] },
        });
        let layer = blob("application/vnd.docker.image.rootfs.diff.tar.gzip", &layer);
        let config = blob("application/vnd.docker.container.image.v1+json", config.to_string().as_bytes());
        let path = format!("/v2/x/blobs/{}", layer["digest"].as_str().unwrap());
        let manifest = json!({ "schemaVersion": 2, "config": config, "layers": [layer] }).to_string();
        let manifest_path = format!("/v2/x/manifests/{}", Digest::of(manifest.as_bytes()));
        let media_type = "application/vnd.docker.distribution.manifest.v2+json; charset=utf-8";
        for name in ["/v2/x/manifests/1", &manifest_path] {
            self.put(name, Answer::new(200, media_type, manifest.clone().into_bytes()));
        }
        (manifest_path, path)
    }

    fn prepare(&self, workspace: &Workspace, image: &str, pull: Pull) -> Result<Prepared, (String, bool)> {
        let options = Options { pull, ..Options::default() };
        let cache = Cache::open(Some(&workspace.path("cache"))).unwrap();
        prepare(&cache, &format!("{}/{image}", self.address), &options, &mut |_, _| {}).map_err(|error| {
            let is_user_error = error.is_user_error();
            let mut line = error.to_string();
            let mut cause = error.source();
            while let Some(error) = cause {
                let _ = write!(line, ": {error}");
                cause = error.source();
            }
            (line.replace(&self.address, "HOST"), is_user_error)
        })
    }
}

fn serve(stream: TcpStream, host: &str, answers: &Mutex<HashMap<String, Answer>>, asked: &Asked) {
    let mut lines = BufReader::new(&stream).lines().map_while(Result::ok);
    let Some(first) = lines.next() else { return };
    let path = first.split(' ').nth(1).unwrap().to_owned();
    let headers: HashMap<String, String> = lines
        .take_while(|line| !line.is_empty())
        .filter_map(|line| {
            line.split_once(": ").map(|(name, value)| (name.to_ascii_lowercase(), value.to_owned()))
        })
        .collect();
    asked.lock().unwrap().push((path.clone(), headers.get("authorization").cloned()));
    let mut answers = answers.lock().unwrap();
    let mut answer =
        answers.get(&path).cloned().unwrap_or_else(|| Answer::new(404, "application/json", b"{}".to_vec()));
    if let Some(token) = &answer.token
        && headers.get("authorization") != Some(&format!("Bearer {token}"))
    {
        answer = Answer::new(401, "application/json", b"{}".to_vec());
        let challenge =
            format!("Bearer realm=\"http://{host}/token\",service=\"s\",scope=\"repository:x:pull\"");
        answer.headers.push(("WWW-Authenticate".to_owned(), challenge));
    }
    let from: Option<usize> =
        headers.get("range").map(|range| range["bytes=".len()..].trim_end_matches('-').parse().unwrap());
    if let (Some(from), 200) = (from, answer.status) {
        answer.status = 206;
        answer.body.drain(..from);
    }
    let sent = answer.broken_at.unwrap_or(answer.body.len()).min(answer.body.len());
    if let Some(answer) = answers.get_mut(&path) {
        answer.broken_at = None;
    }
    let mut head = format!(
        "HTTP/1.1 {} X\r\nContent-Length: {}\r\nConnection: close\r\n",
        answer.status,
        answer.body.len()
    );
    for (name, value) in &answer.headers {
        let _ = write!(head, "{name}: {value}\r\n");
    }
    // A client may close the connection early.
    let _ = (&stream).write_all(&[head.as_bytes(), b"\r\n", &answer.body[..sent]].concat());
}

fn name_of(prepared: &Prepared) -> String {
    support::reader::line(&support::reader::list(&prepared.rootfs), "/name")
        .split('"')
        .nth(1)
        .unwrap()
        .to_owned()
}

#[test]
fn the_pull_policy_is_respected() {
    let (server, workspace) = (Server::start(), Workspace::new());
    assert_eq!(
        server.prepare(&workspace, "x:1", Pull::Never).unwrap_err(),
        ("not in the cache; pull it with `--pull missing`".to_owned(), true)
    );
    assert!(server.asked().is_empty());
    let (manifest, layer) = server.image("first");
    let first = server.prepare(&workspace, "x:1", Pull::Missing).unwrap();
    assert_eq!(name_of(&first), "first");
    let config = format!("/v2/x/blobs/{}", first.digest);
    assert_eq!(server.asked(), ["/v2/x/manifests/1", &config, &layer]);
    server.image("second");
    for pull in [Pull::Missing, Pull::Never] {
        assert_eq!(server.prepare(&workspace, "x:1", pull).unwrap().rootfs, first.rootfs);
    }
    assert!(server.asked().is_empty());
    assert_eq!(name_of(&server.prepare(&workspace, "x:1", Pull::Always).unwrap()), "second");
    assert_eq!(server.asked().len(), 3);
    // The first image is still in the cache, also under its digest.
    let digest = manifest.rsplit('/').next().unwrap();
    let again = server.prepare(&workspace, &format!("x@{digest}"), Pull::Missing).unwrap();
    assert_eq!(again.rootfs, first.rootfs);
    assert_eq!(server.asked(), [manifest, config]);
}

#[test]
fn the_platform_is_selected_from_an_index() {
    let (server, workspace) = (Server::start(), Workspace::new());
    let (manifest, _) = server.image("right");
    let digest = manifest.rsplit('/').next().unwrap();
    let entry = |digest: &str, architecture: &str| json!({ "digest": digest, "platform": { "os": "linux", "architecture": architecture } });
    let index = |entries: Vec<Value>| {
        let index = json!({ "schemaVersion": 2, "manifests": entries }).to_string().into_bytes();
        Answer::new(200, "application/vnd.oci.image.index.v1+json", index)
    };
    let other = Digest::of(b"other").to_string();
    server.put(
        "/v2/x/manifests/1",
        index(vec![entry(&other, "arm64"), entry(digest, "amd64"), entry(&other, "s390x")]),
    );
    assert_eq!(name_of(&server.prepare(&workspace, "x:1", Pull::Missing).unwrap()), "right");
    server.put("/v2/x/manifests/2", index(vec![entry(&other, "arm64")]));
    let (line, is_user_error) = server.prepare(&workspace, "x:2", Pull::Missing).unwrap_err();
    assert_eq!(line, "no image for linux/amd64, only for linux/arm64");
    assert!(is_user_error);
}

#[test]
fn the_content_decides_if_the_registry_sends_no_usable_type() {
    let (server, workspace) = (Server::start(), Workspace::new());
    let (manifest, _) = server.image("right");
    let digest = manifest.rsplit('/').next().unwrap();
    let body = server.answers.lock().unwrap()[&manifest].body.clone();
    let entry = json!({ "digest": digest, "platform": { "os": "linux", "architecture": "amd64" } });
    let typed = |kind: &str, mut document: Value| {
        document["mediaType"] = json!(kind);
        document.to_string().into_bytes()
    };
    let document: Value = serde_json::from_slice(&body).unwrap();
    let index = json!({ "schemaVersion": 2, "manifests": [entry] });
    let manifest_type = "application/vnd.docker.distribution.manifest.v2+json";
    let mut with_null = document.clone();
    with_null["manifests"] = json!([null]);
    let bodies = [
        body,
        typed(manifest_type, document),
        // Its type decides, although it has a field of an index.
        typed(manifest_type, with_null),
        index.to_string().into_bytes(),
        typed("application/vnd.oci.image.index.v1+json", index),
    ];
    for kind in ["binary/octet-stream", "application/x-tar", "text/plain; charset=utf-8", "no type", ""] {
        for (number, body) in bodies.iter().enumerate() {
            server.put("/v2/x/manifests/1", Answer::new(200, kind, body.clone()));
            let found = server.prepare(&workspace, "x:1", Pull::Always).map(|found| name_of(&found));
            assert_eq!(found.as_deref(), Ok("right"), "{kind:?}, body {number}");
        }
    }
    let upper = "Application/VND.docker.Distribution.manifest.v2+JSON";
    for headers in [vec![], vec![("Content-Type".to_owned(), upper.to_owned())]] {
        server.change("/v2/x/manifests/1", |answer| {
            (answer.headers, answer.body) = (headers, bodies[1].clone())
        });
        assert_eq!(name_of(&server.prepare(&workspace, "x:1", Pull::Always).unwrap()), "right");
    }
    let artifact = json!({ "artifactType": "application/x-report", "blobs": [] }).to_string().into_bytes();
    let kind = "application/vnd.oci.artifact.manifest.v1+json";
    server.put("/v2/x/manifests/1", Answer::new(200, kind, artifact));
    let expected = "not a container image; its type is application/x-report";
    assert_eq!(server.prepare(&workspace, "x:1", Pull::Always).unwrap_err(), (expected.to_owned(), true));
}

#[test]
fn tokens_are_sent_to_the_registry_only() {
    let (server, elsewhere, workspace) = (Server::start(), Server::start(), Workspace::new());
    let (_, layer) = server.image("secret");
    for answer in server.answers.lock().unwrap().values_mut() {
        answer.token = Some("abc".to_owned());
    }
    server.put(
        "/token?service=s&scope=repository%3Ax%3Apull",
        Answer::new(200, "application/json", br#"{"token":"abc"}"#.to_vec()),
    );
    // The layer is redirected to another server, which must not see the token.
    let body = server.answers.lock().unwrap()[&layer].body.clone();
    elsewhere.put("/layer", Answer::new(200, "application/octet-stream", body));
    let to = format!("http://{}/layer", elsewhere.address);
    server.change(&layer, |answer| {
        answer.status = 307;
        answer.headers.push(("Location".to_owned(), to));
    });
    assert_eq!(name_of(&server.prepare(&workspace, "x:1", Pull::Missing).unwrap()), "secret");
    assert_eq!(*elsewhere.asked.lock().unwrap(), [("/layer".to_owned(), None)]);
    server.put(
        "/token?service=s&scope=repository%3Ax%3Apull",
        Answer::new(403, "application/json", b"{}".to_vec()),
    );
    let (line, is_user_error) = server.prepare(&workspace, "x:1", Pull::Always).unwrap_err();
    assert!(line.starts_with("access denied by HOST, or the image does not exist"), "{line}");
    assert!(is_user_error);
}

#[test]
fn an_interrupted_download_is_resumed() {
    let (server, workspace) = (Server::start(), Workspace::new());
    let (_, layer) = server.image("whole");
    server.change(&layer, |answer| answer.broken_at = Some(20));
    assert_eq!(name_of(&server.prepare(&workspace, "x:1", Pull::Missing).unwrap()), "whole");
    assert_eq!(server.asked().iter().filter(|path| **path == layer).count(), 2);
}

#[test]
fn wrong_answers_of_a_registry_are_refused() {
    let (server, workspace) = (Server::start(), Workspace::new());
    let fails = |image: &str| {
        let failed = server.prepare(&workspace, image, Pull::Missing).unwrap_err();
        assert!(workspace.drafts().is_empty());
        failed
    };
    assert_eq!(fails("y:1"), ("not found in the registry HOST".to_owned(), true));
    server.put("/v2/y/manifests/1", Answer::new(500, "text/plain", Vec::new()));
    let (line, is_user_error) = fails("y:1");
    assert_eq!(line, "HOST returned status 500 for http://HOST/v2/y/manifests/1");
    assert!(!is_user_error);
    server.put("/v2/y/manifests/1", Answer::new(200, "text/html", b"<html>".to_vec()));
    let (line, is_user_error) = fails("y:1");
    assert!(line.contains(": expected value"), "{line}");
    assert!(is_user_error);
    server.put("/v2/y/manifests/1", Answer::new(200, "text/html", vec![b' '; (8 << 20) + 1]));
    assert_eq!(fails("y:1"), ("1 is larger than 8 MiB".to_owned(), true));
    let (manifest, layer) = server.image("content");
    let digest = manifest.rsplit('/').next().unwrap();
    server.change(&manifest, |answer| answer.body.push(b' '));
    let (line, is_user_error) = fails(&format!("x@{digest}"));
    assert!(line.starts_with(&format!("{digest} has the digest sha256:")), "{line}");
    assert!(is_user_error);
    server.change(&layer, |answer| answer.body[30] ^= 1);
    let (line, is_user_error) = fails("x:1");
    assert!(line.starts_with("layer 1 of 1: the digest is sha256:"), "{line}");
    assert!(is_user_error);
    server.change(&layer, |answer| answer.status = 404);
    assert_eq!(fails("x:1"), ("not found in the registry HOST".to_owned(), true));
}

#[test]
fn unusable_certificates_are_an_error() {
    let workspace = Workspace::new();
    std::fs::write(workspace.path("empty.pem"), "").unwrap();
    std::fs::write(
        workspace.path("damaged.pem"),
        "-----BEGIN CERTIFICATE-----\n%\n-----END CERTIFICATE-----\n",
    )
    .unwrap();
    for file in ["missing.pem", ".", "empty.pem", "damaged.pem"] {
        let output = std::process::Command::new(env!("CARGO_BIN_EXE_kindling-oci"))
            .args(["prepare", "registry.invalid/app"])
            .env("KINDLING_CACHE", workspace.path("cache"))
            .env("SSL_CERT_FILE", workspace.path(file))
            .output()
            .unwrap();
        let line = String::from_utf8(output.stderr).unwrap();
        assert!(
            output.status.code() == Some(1) && line.contains("cannot load the trusted certificates in /"),
            "{line}"
        );
    }
}
