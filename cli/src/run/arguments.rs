//! What a user of `kindling run` may ask for.

use clap::Args;
use std::ffi::OsString;
use std::path::PathBuf;

#[derive(Args, Debug, PartialEq, Eq)]
pub(crate) struct Arguments {
    /// Container image: an OCI layout, an archive of `docker save`, a registry's name; or an EROFS filesystem
    #[arg(value_name = "IMAGE")]
    pub(crate) image: OsString,
    /// Environment entry of the command, NAME=VALUE, or NAME to take its value from here; may be repeated
    #[arg(long, short = 'e', value_name = "NAME[=VALUE]")]
    pub(crate) env: Vec<OsString>,
    /// File with such entries, one a line; those of -e come after them; may be repeated
    #[arg(long, value_name = "FILE")]
    pub(crate) env_file: Vec<PathBuf>,
    /// Working directory of the command
    #[arg(long, short = 'w', value_name = "DIR")]
    pub(crate) workdir: Option<OsString>,
    /// User of the command, and its group
    #[arg(long, short = 'u', value_name = "USER[:GROUP]")]
    pub(crate) user: Option<String>,
    /// Replaces the image's entrypoint
    #[arg(long, value_name = "PROGRAM")]
    pub(crate) entrypoint: Option<OsString>,
    /// Give the command a terminal
    #[arg(long, short = 't')]
    pub(crate) tty: bool,
    /// Accepted and without effect: the command always has this command's input
    #[arg(long, short = 'i')]
    pub(crate) interactive: bool,
    /// Print the name of the guest when its program has been executed, and leave it running; `kindling logs` has its output
    #[arg(long, short = 'd')]
    pub(crate) detach: bool,
    /// This process is the one that stays with a detached guest
    #[arg(skip)]
    pub(crate) stay: bool,
    /// Memory of the guest in MiB, or with a unit: 512, 512m, 2g
    #[arg(long, short = 'm', value_name = "MIB", default_value_t = Self::default().memory, value_parser = mebibytes)]
    pub(crate) memory: u64,
    /// Virtual processors of the guest, 1 to 16
    #[arg(long, value_name = "N", default_value_t = Self::default().cpus)]
    pub(crate) cpus: u64,
    /// Kill the guest after this many seconds; exit status 124
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(TIMEOUT_SECONDS))]
    pub(crate) timeout: Option<u64>,
    /// Name of the guest, by which `kindling exec` finds it
    #[arg(long, value_name = "NAME")]
    pub(crate) name: Option<String>,
    /// Hostname of the guest [default: its name]
    #[arg(long, value_name = "NAME")]
    pub(crate) hostname: Option<OsString>,
    /// Leave nothing of a detached guest behind when it ends; one in the foreground leaves nothing anyway
    #[arg(long)]
    pub(crate) rm: bool,
    /// Network [default: none]: none, user for networking without root, or a tap device
    #[arg(long, alias = "network", value_name = "none|user|TAP")]
    pub(crate) net: Option<OsString>,
    /// A port of the host that leads to one of the guest; takes `--net user`; may be repeated
    #[arg(long, short = 'p', value_name = "[ADDRESS:]HOST:GUEST[/tcp|/udp]")]
    pub(crate) publish: Vec<OsString>,
    /// A volume of this name, or a folder of the host, at a path of the guest; :ro only reads; may be repeated
    #[arg(long, short = 'v', value_name = "SOURCE:GUEST[:ro]")]
    pub(crate) volume: Vec<OsString>,
    /// Programs only read the root filesystem; they write to volumes, shared folders, /dev/shm, /run, /tmp and /var/tmp
    #[arg(long)]
    pub(crate) read_only: bool,
    /// When to ask a registry for an image
    #[arg(long, value_name = "missing|always|never", default_value = "missing",
          value_parser = PULL)]
    pub(crate) pull: String,
    /// Boot the kernel even where it has been booted before
    #[arg(long)]
    pub(crate) cold: bool,
    /// CLOCK_MONOTONIC in nanoseconds when the caller started this command
    #[arg(long, value_name = "NS", hide = true)]
    pub(crate) started_at: Option<u64>,
    /// Print when each step was reached
    #[arg(long)]
    pub(crate) report: bool,
    /// Command instead of the image's
    #[arg(value_name = "COMMAND", trailing_var_arg = true, allow_hyphen_values = true)]
    pub(crate) command: Vec<OsString>,
}

/// Of a line that names nothing but an image.
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

/// When a registry is asked; the first without asking.
pub(crate) const PULL: [&str; 3] = ["missing", "always", "never"];
/// Time limits: up to a year.
pub(crate) const TIMEOUT_SECONDS: std::ops::RangeInclusive<u64> = 1..=31_536_000;

/// Memory as users write it, in MiB.
fn mebibytes(text: &str) -> Result<u64, &'static str> {
    let digits = text.trim_end_matches(|letter: char| letter.is_ascii_alphabetic());
    let factor = match &text[digits.len()..] {
        "" | "m" | "M" => 1,
        "g" | "G" => 1 << 10,
        _ => return Err("MiB as a number, or with m or g behind it"),
    };
    let number =
        digits.bytes().all(|byte| byte.is_ascii_digit()).then(|| digits.parse::<u64>().ok()).flatten();
    number.and_then(|number| number.checked_mul(factor)).ok_or("MiB as a number, or with m or g behind it")
}

#[cfg(test)]
mod tests {
    use super::mebibytes;

    #[test]
    fn memory_may_have_a_unit() {
        for (text, mib) in [("512", 512), ("0512m", 512), ("2g", 2048), ("3G", 3072)] {
            assert_eq!(mebibytes(text), Ok(mib), "{text}");
        }
        for text in ["", "m", "+5", "-5", "1.5g", "512mb", "1k", "18446744073709551615g", "5 g", "é"] {
            assert!(mebibytes(text).is_err(), "{text}");
        }
    }
}
