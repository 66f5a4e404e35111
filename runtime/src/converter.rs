//! Runs `kindling-oci`. An image may have taken it over, so that its output is bounded and cannot control a terminal.

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::retry_on_intr;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

/// Maximum length of the description of an image in bytes: manifests and configurations have at most 8 MiB.
const OUTPUT_MAX: usize = 32 << 20;
/// Maximum length of all messages in bytes: hundreds of layers with a line each.
const MESSAGES_MAX: usize = 1 << 20;
/// Maximum length of a line of a message in bytes; longer ones are divided.
const LINE_MAX: usize = 16 << 10;

/// The variables that the converter needs: where the cache is, logins and certificates, and proxies. Others may have
/// secrets, which an image that has taken it over could send anywhere.
const VARIABLES: [&str; 14] = [
    "HOME",
    "XDG_CACHE_HOME",
    "XDG_RUNTIME_DIR",
    "KINDLING_CACHE",
    "DOCKER_CONFIG",
    "SSL_CERT_FILE",
    "ALL_PROXY",
    "all_proxy",
    "HTTPS_PROXY",
    "https_proxy",
    "HTTP_PROXY",
    "http_proxy",
    "NO_PROXY",
    "no_proxy",
];

/// A command that executes the converter at `program`, with the variables that it needs.
pub(crate) fn command(program: &Path) -> Command {
    let mut command = Command::new(program);
    let given = VARIABLES.into_iter().filter_map(|name| Some((name, std::env::var_os(name)?)));
    command.env_clear().envs(given);
    command
}

/// Runs a command to its end, with empty input. Its messages are written to `messages` line by line. The result contains its
/// standard output only.
///
/// # Errors
/// When the command cannot be executed, or prints more than a description may have.
pub(crate) fn run(command: &mut Command, messages: &mut impl Write) -> io::Result<Output> {
    let command = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn()?;
    let result = relay(&mut child, messages);
    if result.is_err() {
        let _ = child.kill();
    }
    let status = child.wait()?;
    Ok(Output { status, stdout: result?, stderr: Vec::new() })
}

/// Forwards messages until the end of both streams. Returns the output.
fn relay(child: &mut Child, to: &mut impl Write) -> io::Result<Vec<u8>> {
    let (mut stdout, mut stderr) = (child.stdout.take(), child.stderr.take());
    let (mut output, mut messages) = (Vec::new(), Messages::default());
    let mut buffer = vec![0; LINE_MAX];
    while stdout.is_some() || stderr.is_some() {
        let descriptors = [stdout.as_ref().map(AsFd::as_fd), stderr.as_ref().map(AsFd::as_fd)];
        let mut polled: Vec<_> =
            descriptors.iter().flatten().map(|fd| PollFd::from_borrowed_fd(*fd, PollFlags::IN)).collect();
        retry_on_intr(|| poll(&mut polled, None))?;
        let mut ready = polled.iter().map(|fd| !fd.revents().is_empty());
        let [has_output, has_message] = descriptors.map(|fd| fd.is_some() && ready.next() == Some(true));
        if has_output {
            match read(&mut stdout, &mut buffer)? {
                bytes if output.len() + bytes.len() > OUTPUT_MAX => {
                    return Err(io::Error::new(ErrorKind::FileTooLarge, "its output is too long"));
                }
                bytes => output.extend_from_slice(bytes),
            }
        }
        if has_message {
            let bytes = read(&mut stderr, &mut buffer)?;
            messages.add(bytes, to);
        }
    }
    messages.finish(to);
    Ok(output)
}

/// Reads once. At the end, the stream becomes `None`.
fn read<'a>(stream: &mut Option<impl Read>, buffer: &'a mut [u8]) -> io::Result<&'a [u8]> {
    let count = match stream.as_mut().map(|stream| stream.read(buffer)) {
        Some(Err(error)) if error.kind() == ErrorKind::Interrupted => return Ok(&[]),
        Some(result) => result?,
        None => 0,
    };
    if count == 0 {
        *stream = None;
    }
    Ok(&buffer[..count])
}

/// Messages of the converter.
#[derive(Default)]
struct Messages {
    /// The start of a line.
    line: Vec<u8>,
    /// Number of bytes so far.
    length: usize,
}

impl Messages {
    /// Forwards complete lines. What exceeds the maximum is dropped.
    fn add(&mut self, bytes: &[u8], to: &mut impl Write) {
        for part in bytes.split_inclusive(|&byte| byte == b'\n') {
            self.line.extend_from_slice(part);
            if part.ends_with(b"\n") || self.line.len() >= LINE_MAX {
                self.finish(to);
            }
        }
    }

    /// Forwards the current line.
    fn finish(&mut self, to: &mut impl Write) {
        let line = std::mem::take(&mut self.line);
        self.length = self.length.saturating_add(line.len());
        if !line.is_empty() && self.length <= MESSAGES_MAX {
            // Without a standard error, messages are lost.
            let _ = writeln!(to, "{}", printable(&line));
        }
    }
}

/// The text of a line without control characters.
pub(crate) fn printable(line: &[u8]) -> String {
    let text = String::from_utf8_lossy(line);
    text.trim_end().chars().map(|char| if char.is_control() { ' ' } else { char }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_converter_gets_no_other_variables() {
        let output = command(Path::new("/usr/bin/env")).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success() && text.lines().any(|line| line.starts_with("HOME=")), "{text}");
        assert!(std::env::var_os("PATH").is_some(), "this process has a variable that is not passed on");
        let names = text.lines().filter_map(|line| Some(line.split_once('=')?.0));
        assert!(names.into_iter().all(|name| VARIABLES.contains(&name)), "{text}");
    }

    #[test]
    fn messages_cannot_control_a_terminal_and_are_bounded() {
        let mut messages = Messages::default();
        let mut printed = Vec::new();
        messages.add(b"a\x1b]0;title\x07b\nhalf ", &mut printed);
        assert_eq!(printed, b"a ]0;title b\n");
        messages.add("of it \u{9b}31m".as_bytes(), &mut printed);
        messages.finish(&mut printed);
        assert_eq!(String::from_utf8_lossy(&printed), "a ]0;title b\nhalf of it  31m\n");
        for _ in 0..3 * MESSAGES_MAX / LINE_MAX {
            messages.add(&[b'x'; LINE_MAX], &mut printed);
        }
        assert!(printed.len() <= MESSAGES_MAX + MESSAGES_MAX / LINE_MAX);
    }

    #[test]
    fn output_is_complete_and_bounded() {
        let sh = |script: &str| run(Command::new("sh").args(["-c", script]), &mut io::sink());
        let output = sh("head -c 1000000 /dev/zero; echo; exit 3").unwrap();
        assert_eq!((output.stdout.len(), output.status.code()), (1_000_001, Some(3)));
        let error = sh("exec cat /dev/zero").unwrap_err();
        assert_eq!(error.to_string(), "its output is too long");
        // A program that closes its streams is waited for.
        assert_eq!(sh("exec >&- 2>&-; exit 4").unwrap().status.code(), Some(4));
    }
}
