//! Views of guests: JSON, and cells of tables.

use kindling::guest::{Guest, GuestRecord, Payload};
use serde::Serialize;
use std::path::PathBuf;
use std::time::SystemTime;

/// JSON form of a guest.
#[derive(Debug, Serialize)]
pub(crate) struct View<'a> {
    name: &'a str,
    state: &'static str,
    /// Exit status of a guest that has ended.
    status: Option<u8>,
    /// Process ID of the monitor of a running guest.
    pid: Option<u32>,
    /// Process ID of the front of a running guest, which receives the signals for the guest.
    front_pid: Option<u32>,
    image: &'a str,
    directory: &'a PathBuf,
    command: &'a [String],
    #[serde(flatten)]
    payload: &'a Payload,
    /// Seconds since 1970.
    started: u64,
    memory_mib: u64,
    vcpus: u8,
    stop_signal: u8,
    is_embedded: bool,
    is_kept: bool,
    volumes: &'a [String],
    /// Published ports, such as `127.0.0.1:8080->80/tcp`.
    ports: Vec<String>,
    folder: &'a PathBuf,
    /// Path of the Unix socket of the guest's vsock.
    socket: PathBuf,
}

impl<'a> View<'a> {
    pub(crate) fn of(guest: &'a Guest) -> Self {
        let GuestRecord {
            image,
            directory,
            command,
            payload,
            started,
            memory_mib,
            vcpus,
            stop_signal,
            is_embedded,
            is_kept,
            volumes,
            ports,
            status,
            ..
        } = &guest.record;
        Self {
            name: &guest.name,
            state: guest.state().name(),
            status: *status,
            pid: guest.monitor().ok().flatten().map(|monitor| monitor.pid),
            front_pid: guest.front().ok().flatten().map(|front| front.pid),
            image,
            directory,
            command,
            payload,
            started: *started,
            memory_mib: *memory_mib,
            vcpus: *vcpus,
            stop_signal: *stop_signal,
            is_embedded: *is_embedded,
            is_kept: *is_kept,
            volumes,
            ports: ports.iter().map(ToString::to_string).collect(),
            folder: &guest.folder,
            socket: guest.socket(),
        }
    }
}

/// The time since the guest was started, with a unit; empty if the record has no time of the start.
pub(crate) fn age(guest: &Guest) -> String {
    if guest.record.started == 0 {
        return String::new();
    }
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |time| time.as_secs());
    with_unit(now.saturating_sub(guest.record.started))
}

fn with_unit(seconds: u64) -> String {
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7_200 => format!("{} min", seconds / 60),
        7_200..172_800 => format!("{} h", seconds / 3_600),
        _ => format!("{} d", seconds / 86_400),
    }
}

/// Formats a table whose columns are as wide as their widest cell.
pub(crate) fn table<const N: usize>(head: [&str; N], rows: &[[String; N]]) -> String {
    let mut lines = vec![head.map(str::to_owned)];
    lines.extend_from_slice(rows);
    let widths: [usize; N] = std::array::from_fn(|column| {
        lines.iter().map(|line| line[column].chars().count()).max().unwrap_or(0)
    });
    let line = |cells: &[String; N]| {
        let padded: Vec<_> = cells.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        format!("{}\n", padded.join("  ").trim_end())
    };
    lines.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages_have_a_unit() {
        let ages = [0, 119, 120, 7_199, 7_200, 172_800].map(with_unit);
        assert_eq!(ages, ["0 s", "119 s", "2 min", "119 min", "2 h", "2 d"]);
    }

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let text = table(["A", "LONG"], &[["wüde".into(), "x".into()], [String::new(), "y".into()]]);
        assert_eq!(text, "A     LONG\nwüde  x\n      y\n");
    }
}
