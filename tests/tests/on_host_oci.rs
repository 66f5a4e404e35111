//! Images pulled from a registry (Debian's docker-registry).

use kindling_vmm::config::image::sha256;
use serde_json::{Value, json};
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use tests::{run, testbed};

/// A registry on a local port chosen by the kernel.
struct Registry {
    child: Child,
    address: String,
}

impl Registry {
    fn start(scratch: &Path) -> Self {
        let config = scratch.join("config.yml");
        let root = scratch.join("registry");
        let text = json!({
            "version": 0.1,
            "storage": { "filesystem": { "rootdirectory": root } },
            "http": { "addr": "127.0.0.1:0" },
        });
        // JSON is valid YAML.
        fs::write(&config, text.to_string()).unwrap();
        let mut command = Command::new(testbed("docker-registry"));
        let mut child =
            command.arg("serve").arg(config).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines().map_while(Result::ok);
        let address = lines
            .find_map(|line| {
                let (_, rest) = line.split_once("listening on ")?;
                Some(rest.split(['"', ' ', ',']).next()?.to_owned())
            })
            .expect("the registry prints its address");
        // Drains the pipe, so that the registry never blocks on a full one.
        std::thread::spawn(move || lines.for_each(drop));
        Self { child, address }
    }

    /// Sends a request; returns the Location header of the response.
    fn request(&self, method: &str, path: &str, media_type: &str, body: &[u8]) -> Option<String> {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        let (address, length) = (&self.address, body.len());
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\nContent-Type: {media_type}\r\n\
             Content-Length: {length}\r\n\r\n"
        );
        stream.write_all(&[head.as_bytes(), body].concat()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 20"), "{method} {path}: {answer}");
        let location = answer.lines().find_map(|line| line.strip_prefix("Location: "))?;
        Some(location.trim().replace(&format!("http://{address}"), ""))
    }

    fn push(&self, media_type: &str, blob: &[u8]) -> Value {
        let digest = format!("sha256:{}", sha256(blob));
        let location = self.request("POST", "/v2/team/app/blobs/uploads/", "text/plain", b"").unwrap();
        let separator = if location.contains('?') { '&' } else { '?' };
        self.request(
            "PUT",
            &format!("{location}{separator}digest={digest}"),
            "application/octet-stream",
            blob,
        );
        json!({ "mediaType": media_type, "digest": digest, "size": blob.len() })
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn prepare(cache: &Path, image: &str) -> Value {
    let mut command = Command::new(testbed("kindling-oci"));
    let output = command.args(["prepare", "--cache"]).arg(cache).arg(image).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn an_image_from_a_registry_converts_like_the_same_image_from_a_file() {
    let scratch = tempfile::tempdir().unwrap();
    let scratch = scratch.path();
    let tree = scratch.join("tree");
    fs::create_dir_all(tree.join("etc")).unwrap();
    fs::write(tree.join("etc/passwd"), "root:x:0:0::/root:/bin/sh\nweb:x:33:33::/srv:/bin/sh\n").unwrap();
    fs::write(tree.join("large"), "a line\n".repeat(1 << 20)).unwrap();
    let execute = |program: &str, arguments: &[&str]| {
        let status = Command::new(program).args(arguments).current_dir(scratch).status().unwrap();
        assert!(status.success(), "{program}: {status}");
    };
    execute("tar", &["--create", "--file", "layer.tar", "--directory", "tree", "."]);
    execute("gzip", &["--keep", "layer.tar"]);
    let layer = fs::read(scratch.join("layer.tar")).unwrap();
    let config = json!({
        "architecture": "amd64", "os": "linux", "config": { "User": "web", "Cmd": ["/bin/sh"] },
        "rootfs": { "type": "layers", "diff_ids": [format!("sha256:{}", sha256(&layer))] },
    });
    fs::write(scratch.join("config.json"), config.to_string()).unwrap();
    let saved = json!([{ "Config": "config.json", "Layers": ["layer.tar"] }]).to_string();
    fs::write(scratch.join("manifest.json"), saved).unwrap();
    execute("tar", &["--create", "--file", "saved.tar", "manifest.json", "config.json", "layer.tar"]);

    let registry = Registry::start(scratch);
    let packed = fs::read(scratch.join("layer.tar.gz")).unwrap();
    let layer = registry.push("application/vnd.oci.image.layer.v1.tar+gzip", &packed);
    let config = registry.push("application/vnd.oci.image.config.v1+json", config.to_string().as_bytes());
    let media_type = "application/vnd.oci.image.manifest.v1+json";
    let manifest = json!({
        "schemaVersion": 2, "mediaType": media_type, "config": config, "layers": [layer],
    });
    registry.request("PUT", "/v2/team/app/manifests/1", media_type, manifest.to_string().as_bytes());

    let pulled = prepare(&scratch.join("pulled"), &format!("{}/team/app:1", registry.address));
    let opened = prepare(&scratch.join("opened"), scratch.join("saved.tar").to_str().unwrap());
    assert_eq!(pulled["config"]["user"]["uid"], 33);
    for key in ["digest", "config"] {
        assert_eq!(pulled[key], opened[key]);
    }
    let name = pulled["depends"]["source"].as_str().unwrap();
    assert!(name.starts_with(scratch.join("pulled").to_str().unwrap()) && name.ends_with(".name"), "{name}");
    assert_eq!(opened["depends"], json!({ "source": scratch.join("saved.tar"), "absent": [] }));
    let content = |prepared: &Value| fs::read(prepared["rootfs"].as_str().unwrap()).unwrap();
    assert!(content(&pulled) == content(&opened));

    // The library lists and removes what it has converted.
    let mut example = Command::new(testbed("examples/images"));
    example.arg(scratch.join("saved.tar")).env("KINDLING_CACHE", scratch.join("listed"));
    let programs = testbed("kindling-oci");
    let output = run(example.env("KINDLING_PROGRAMS", programs.parent().unwrap()));
    let digest = opened["digest"].as_str().unwrap();
    output
        .expect_status(0)
        .expect_stdout(digest)
        .expect_stdout("saved.tar")
        .expect_stdout("1 removed, 0 left");

    // The library prints nothing; the reason is in the error.
    let mut example = Command::new(testbed("examples/images"));
    example.arg(scratch.join("absent.tar")).env("KINDLING_CACHE", scratch.join("listed"));
    let outcome = run(example.env("KINDLING_PROGRAMS", programs.parent().unwrap()));
    let stderr = &outcome.expect_status(1).stderr;
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    outcome.expect_stderr("absent.tar").expect_stderr("no such file");
}
