//! The arguments of `kindling run`.

use clap::Args;
use std::ffi::OsString;
use std::path::PathBuf;

#[derive(Args, Debug, PartialEq, Eq)]
pub(crate) struct Arguments {
    /// Image: a name of a registry, the path of a `docker save` archive or an OCI layout, or an EROFS file
    #[arg(value_name = "IMAGE")]
    pub(crate) image: OsString,
    /// Set an environment variable; NAME alone takes the value from the environment of kindling (repeatable)
    #[arg(long, short = 'e', value_name = "NAME[=VALUE]")]
    pub(crate) env: Vec<OsString>,
    /// Read environment variables from a file, one a line; --env overrides them (repeatable)
    #[arg(long, value_name = "FILE")]
    pub(crate) env_file: Vec<PathBuf>,
    /// Working directory in the guest [default: the image's]
    #[arg(long, short = 'w', value_name = "DIR")]
    pub(crate) workdir: Option<OsString>,
    /// User and group, as names of the image or numbers [default: the image's]
    #[arg(long, short = 'u', value_name = "USER[:GROUP]")]
    pub(crate) user: Option<String>,
    /// Override the entrypoint of the image
    #[arg(long, value_name = "PROGRAM")]
    pub(crate) entrypoint: Option<OsString>,
    /// Allocate a terminal for the command
    #[arg(long, short = 't')]
    pub(crate) tty: bool,
    /// Ignored: the standard input is always attached
    #[arg(long, short = 'i')]
    pub(crate) interactive: bool,
    /// Run in the background, and print the name of the guest; `kindling logs` prints its output
    #[arg(long, short = 'd')]
    pub(crate) detach: bool,
    /// Whether this process is the front of a detached guest
    #[arg(skip)]
    pub(crate) stay: bool,
    /// Memory in MiB, or with the suffix m or g: 512, 512m, 2g
    #[arg(long, short = 'm', value_name = "MIB", default_value_t = Self::default().memory, value_parser = mebibytes)]
    pub(crate) memory: u64,
    /// Number of vCPUs, 1 to 16
    #[arg(long, value_name = "N", default_value_t = Self::default().cpus)]
    pub(crate) cpus: u64,
    /// Kill the guest after this time, with exit status 124
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(TIMEOUT_SECONDS))]
    pub(crate) timeout: Option<u64>,
    /// Name of the guest, for `kindling exec` and others [default: random]
    #[arg(long, value_name = "NAME")]
    pub(crate) name: Option<String>,
    /// Hostname of the guest [default: the name of the guest]
    #[arg(long, value_name = "NAME")]
    pub(crate) hostname: Option<OsString>,
    /// Remove a detached guest when it ends; a guest in the foreground is always removed
    #[arg(long)]
    pub(crate) rm: bool,
    /// Network: none, user (through passt, without root), or a tap device [default: none]
    #[arg(long, alias = "network", value_name = "none|user|TAP")]
    pub(crate) net: Option<OsString>,
    /// Publish a port of the guest on the host, by --net user (repeatable)
    #[arg(long, short = 'p', value_name = "[ADDRESS:]HOST:GUEST[/tcp|/udp]")]
    pub(crate) publish: Vec<OsString>,
    /// Mount a volume, or a directory of the host, at a path in the guest (repeatable)
    #[arg(long, short = 'v', value_name = "SOURCE:GUEST[:ro]")]
    pub(crate) volume: Vec<OsString>,
    /// Mount the root filesystem read-only; volumes, shared directories, /dev/shm, /run, /tmp and /var/tmp stay writable
    #[arg(long)]
    pub(crate) read_only: bool,
    /// When to pull the image from its registry
    #[arg(long, value_name = "missing|always|never", default_value = "missing",
          value_parser = PULL)]
    pub(crate) pull: String,
    /// Boot the kernel even if there is a pre-booted one
    #[arg(long)]
    pub(crate) cold: bool,
    /// CLOCK_MONOTONIC in nanoseconds when the caller started this command
    #[arg(long, value_name = "NS", hide = true)]
    pub(crate) started_at: Option<u64>,
    /// Print the times of the steps on standard error at the end
    #[arg(long)]
    pub(crate) report: bool,
    /// Command and arguments [default: the image's]
    #[arg(value_name = "COMMAND", trailing_var_arg = true, allow_hyphen_values = true)]
    pub(crate) command: Vec<OsString>,
}

/// The arguments of a command line without options.
impl Default for Arguments {
    fn default() -> Self {
        Self {
            image: OsString::new(),
            env: Vec::new(),
            env_file: Vec::new(),
            workdir: None,
            user: None,
            entrypoint: None,
            tty: false,
            interactive: false,
            detach: false,
            stay: false,
            memory: 512,
            cpus: 1,
            timeout: None,
            name: None,
            hostname: None,
            rm: false,
            net: None,
            publish: Vec::new(),
            volume: Vec::new(),
            read_only: false,
            pull: PULL[0].to_owned(),
            cold: false,
            started_at: None,
            report: false,
            command: Vec::new(),
        }
    }
}

/// Values of `--pull`; the first is the default.
pub(crate) const PULL: [&str; 3] = ["missing", "always", "never"];
/// Values of `--timeout` in seconds: up to a year.
pub(crate) const TIMEOUT_SECONDS: std::ops::RangeInclusive<u64> = 1..=31_536_000;

/// Parses the value of `--memory`. Returns MiB.
fn mebibytes(text: &str) -> Result<u64, &'static str> {
    let digits = text.trim_end_matches(|letter: char| letter.is_ascii_alphabetic());
    let factor = match &text[digits.len()..] {
        "" | "m" | "M" => 1,
        "g" | "G" => 1 << 10,
        _ => return Err(MEMORY_FORM),
    };
    let number =
        digits.bytes().all(|byte| byte.is_ascii_digit()).then(|| digits.parse::<u64>().ok()).flatten();
    number.and_then(|number| number.checked_mul(factor)).ok_or(MEMORY_FORM)
}

const MEMORY_FORM: &str = "expected a number of MiB, or a number with the suffix m or g";

#[cfg(test)]
mod tests {
    use super::mebibytes;

    #[test]
    fn memory_may_have_a_suffix() {
        for (text, mib) in [("512", 512), ("0512m", 512), ("2g", 2048), ("3G", 3072)] {
            assert_eq!(mebibytes(text), Ok(mib), "{text}");
        }
        for text in ["", "m", "+5", "-5", "1.5g", "512mb", "1k", "18446744073709551615g", "5 g", "é"] {
            assert!(mebibytes(text).is_err(), "{text}");
        }
    }
}
