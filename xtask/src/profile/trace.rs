//! The timeline in Chrome's trace event format, for Perfetto.

use super::record::{Lane, Profile};
use anyhow::Result;
use serde_json::{Value, json};

/// The processes of the trace: number and name. The kernel's phases and initcalls are threads of one process.
const PROCESSES: [(u64, &str); 3] = [(1, "VMM"), (2, "kernel"), (3, "init")];

const fn process_and_thread(lane: Lane) -> (u64, u64) {
    match lane {
        Lane::Vmm => (1, 1),
        Lane::Kernel => (2, 1),
        Lane::Initcall => (2, 2),
        Lane::Init => (3, 1),
    }
}

/// The trace as JSON. The format's times are in microseconds.
pub(super) fn json(profile: &Profile) -> Result<String> {
    let mut events: Vec<Value> = Vec::new();
    for (pid, name) in PROCESSES {
        events.push(json!({"ph": "M", "pid": pid, "name": "process_name", "args": {"name": name}}));
        events
            .push(json!({"ph": "M", "pid": pid, "name": "process_sort_index", "args": {"sort_index": pid}}));
    }
    let threads =
        [(1, 1, "steps"), (1, 2, "exits to the VMM"), (2, 1, "phases"), (2, 2, "initcalls"), (3, 1, "steps")];
    for (pid, tid, name) in threads {
        events
            .push(json!({"ph": "M", "pid": pid, "tid": tid, "name": "thread_name", "args": {"name": name}}));
    }
    for phase in &profile.phases {
        let (pid, tid) = process_and_thread(phase.lane);
        events.push(json!({
            "ph": "X", "pid": pid, "tid": tid, "name": phase.name, "cat": phase.lane.title(),
            "ts": microseconds(phase.start), "dur": microseconds(phase.duration), "args": {"about": phase.about},
        }));
    }
    for exits in &profile.exits {
        let name = format!("{} {:#x} ({})", exits.reason, exits.address, exits.device);
        events.extend(exits.at.iter().map(|&at| {
            json!({"ph": "i", "s": "t", "pid": 1, "tid": 2, "name": name, "cat": "exit", "ts": microseconds(at)})
        }));
    }
    let trace = json!({"traceEvents": events, "displayTimeUnit": "ns"});
    Ok(serde_json::to_string(&trace)? + "\n")
}

#[expect(clippy::cast_precision_loss, reason = "boots take less than 2^53 ns")]
fn microseconds(ns: u64) -> f64 {
    ns as f64 / 1e3
}

#[cfg(test)]
mod tests {
    use super::super::record::tests::profile;
    use super::*;

    #[test]
    fn phases_are_complete_events_and_exits_are_instant_events() {
        let trace: Value = serde_json::from_str(&json(&profile()).unwrap()).unwrap();
        let events = trace["traceEvents"].as_array().unwrap();
        let of = |kind: &str| events.iter().filter(|event| event["ph"] == kind).collect::<Vec<_>>();
        let pty = of("X").into_iter().find(|event| event["name"] == "pty_init").unwrap().clone();
        assert_eq!((pty["pid"].clone(), pty["tid"].clone()), (json!(2), json!(2)));
        assert_eq!((pty["ts"].clone(), pty["dur"].clone()), (json!(2000.0), json!(1500.0)));
        let exits = of("i");
        assert_eq!(exits.len(), 2);
        assert_eq!(exits[0]["name"], "port write 0x3f8 (serial port)");
        assert!(of("M").iter().any(|event| event["args"]["name"] == "initcalls"));
    }
}
