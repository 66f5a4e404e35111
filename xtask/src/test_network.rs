//! Debian's programs for network tests, with their shared libraries, which the lab lacks.

use crate::build_image::{self, Arguments as Image};
use crate::debian;
use anyhow::{Context, Result};
use std::fs;
use std::path::Path;

/// Packages and their files for guests and host.
const BOTH: [(&str, &str); 13] = [
    ("iperf3", "usr/bin/iperf3"),
    ("nginx", "usr/sbin/nginx"),
    ("libiperf0", "libiperf.so.0"),
    ("libsctp1", "libsctp.so.1"),
    ("libcrypt1", "libcrypt.so.1"),
    ("libpcre2-8-0", "libpcre2-8.so.0"),
    ("libssl3", "libssl.so.3"),
    ("libssl3", "libcrypto.so.3"),
    ("zlib1g", "libz.so.1"),
    ("libc6", "libc.so.6"),
    ("libc6", "libm.so.6"),
    ("libc6", "libresolv.so.2"),
    ("libc6", "ld-linux-x86-64.so.2"),
];

/// Packages and their files for the host only: passt, and curl with its libraries.
const HOST: [(&str, &str); 28] = [
    ("passt", "usr/bin/passt"),
    ("curl", "usr/bin/curl"),
    ("libcurl4", "libcurl.so.4"),
    ("libnghttp2-14", "libnghttp2.so.14"),
    ("libidn2-0", "libidn2.so.0"),
    ("librtmp1", "librtmp.so.1"),
    ("libssh2-1", "libssh2.so.1"),
    ("libpsl5", "libpsl.so.5"),
    ("libgssapi-krb5-2", "libgssapi_krb5.so.2"),
    ("libldap-2.5-0", "libldap-2.5.so.0"),
    ("libldap-2.5-0", "liblber-2.5.so.0"),
    ("libzstd1", "libzstd.so.1"),
    ("libbrotli1", "libbrotlidec.so.1"),
    ("libbrotli1", "libbrotlicommon.so.1"),
    ("libunistring2", "libunistring.so.2"),
    ("libgnutls30", "libgnutls.so.30"),
    ("libhogweed6", "libhogweed.so.6"),
    ("libnettle8", "libnettle.so.8"),
    ("libgmp10", "libgmp.so.10"),
    ("libkrb5-3", "libkrb5.so.3"),
    ("libk5crypto3", "libk5crypto.so.3"),
    ("libcom-err2", "libcom_err.so.2"),
    ("libkrb5support0", "libkrb5support.so.0"),
    ("libsasl2-2", "libsasl2.so.2"),
    ("libp11-kit0", "libp11-kit.so.0"),
    ("libtasn1-6", "libtasn1.so.6"),
    ("libkeyutils1", "libkeyutils.so.1"),
    ("libffi8", "libffi.so.8"),
];

/// Library folders in packages.
const LIBRARIES: [&str; 2] = ["usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu"];

/// Lays out the folder `network` of the testbed, and builds the image `network` from `root` with additional files.
pub(crate) fn build(testbed: &Path, root: &Path) -> Result<()> {
    let folder = testbed.join("network");
    let guest = root.join("lib64");
    for path in [&folder, &guest] {
        fs::create_dir_all(path)?;
    }
    for (package, path) in BOTH.into_iter().chain(HOST) {
        copy(package, path, &folder)?;
    }
    // In the guest they are in the folder of the dynamic loader.
    for (package, path) in BOTH {
        copy(package, path, &guest)?;
    }
    fs::create_dir(root.join("lib"))?;
    std::os::unix::fs::symlink("/lib64", root.join("lib/x86_64-linux-gnu"))?;
    fs::write(root.join("etc/group"), "root:x:0:\n")?;
    build_image::build(&Image {
        name: Some("network".to_owned()),
        root: Some(root.into()),
        out: Some(testbed.join("images/network")),
        ..Image::default()
    })?;
    Ok(())
}

/// Copies a program (given by its path) or a library (given by its name).
fn copy(package: &str, path: &str, folder: &Path) -> Result<()> {
    let unpacked = debian::unpacked(package)?;
    let candidates =
        [""].iter().chain(&LIBRARIES).map(|library_folder| unpacked.join(library_folder).join(path));
    let file = candidates.into_iter().find(|file| file.exists());
    let file = file.with_context(|| format!("Debian's package {package} contains no {path}"))?;
    let name = file.file_name().unwrap_or_default();
    fs::copy(&file, folder.join(name)).with_context(|| format!("cannot copy {}", file.display()))?;
    Ok(())
}
