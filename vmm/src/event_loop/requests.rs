//! The event loop's part in requests: those of the front, and of other programs, such as to pause the machine or to save it.

use super::{EventLoop, REQUEST, watch};
use crate::bus::lock;
use crate::control::{Answer, Asker, Control, Query, Request, Statistics};
use crate::error::with_causes;
use crate::machine::Machine;
use crate::preboot::error::PrebootError;
use crate::preboot::snapshot;
use crate::vcpu_threads::VcpuThreads;
use guest_protocol::BootMark;
use rustix::event::epoll;
use std::os::fd::AsFd;
use std::time::Duration;

/// Time limit for the requests in flight of a guest of which a snapshot is taken.
const SNAPSHOT_LIMIT: Duration = Duration::from_secs(5);

/// A snapshot that was requested.
#[derive(Clone, Copy, Debug)]
pub(super) struct Requested {
    /// The number of the program.
    number: u32,
    /// Whether the machine stays paused then.
    pauses: bool,
}

impl EventLoop {
    /// Serves a request of the front, and returns whether the machine continues. It stops if the front has closed the socket
    /// without detaching before, or sends an invalid request.
    pub(super) fn serve_control(&mut self, vcpus: &VcpuThreads) -> bool {
        let Some(control) = &mut self.control else { return true };
        match control.receive() {
            Some(Request::SetBalloon(mib)) => control.set_balloon(mib),
            Some(Request::Query(number, query)) => self.serve_query(Asker::Front(number), query, vcpus),
            None if control.is_detached() => {
                let _ = epoll::delete(&self.epoll, control.as_fd());
            }
            None
            | Some(
                Request::Start(_)
                | Request::Snapshot(_)
                | Request::Spare(..)
                | Request::Preboot(_)
                | Request::Stop,
            ) => {
                return false;
            }
        }
        true
    }

    /// Accepts the connection of another program.
    pub(super) fn accept_requests(&mut self) {
        let Some(requests) = self.control.as_mut().and_then(|control| control.requests.as_mut()) else {
            return;
        };
        if let Some((number, client)) = requests.accept() {
            // Without the watch, the program waits in vain.
            let _ = watch(&self.epoll, client, REQUEST | u64::from(number));
        }
    }

    /// Serves the request of another program, or the end of its connection.
    pub(super) fn serve_request(&mut self, data: u64, machine: &Machine, vcpus: &VcpuThreads) {
        let Ok(number) = u32::try_from(data & !REQUEST) else { return };
        let requests = self.control.as_mut().and_then(|control| control.requests.as_mut());
        match requests.and_then(|requests| requests.receive(number)) {
            Some(Query::Snapshot { pauses }) => {
                self.prepare_snapshot(Requested { number, pauses }, machine, vcpus);
            }
            Some(query) => self.serve_query(Asker::Other(number), query, vcpus),
            None if self.snapshot.is_some_and(|requested| requested.number == number) => {
                self.forget_snapshot(machine);
            }
            None => {}
        }
        // It may have disconnected.
        let control = self.control.as_ref();
        self.pausing.retain(|asker| control.is_some_and(|control| control.waits(*asker)));
    }

    /// Makes the vCPUs save their states when the guest has frozen its processes.
    fn prepare_snapshot(&mut self, requested: Requested, machine: &Machine, vcpus: &VcpuThreads) {
        let Some(control) = &mut self.control else { return };
        if self.snapshot.is_some_and(|earlier| !control.is_connected(earlier.number)) && !self.is_saving {
            lock(&machine.devices.marks).forget_calls_at(BootMark::Frozen as u8);
            self.snapshot = None;
        }
        let answer = match control.start_notifier() {
            Some(notify) if self.snapshot.is_none() => {
                let pause = vcpus.marker();
                lock(&machine.devices.marks).call_at(BootMark::Frozen as u8, move || {
                    pause();
                    notify();
                });
                lock(&machine.devices.configuration).continue_saved();
                self.snapshot = Some(requested);
                Answer::Done
            }
            _ => Answer::Refused("a snapshot of this guest is being taken".to_owned()),
        };
        control.answer(Asker::Other(requested.number), answer);
    }

    /// Forgets a snapshot whose program has gone before the guest had frozen its processes.
    fn forget_snapshot(&mut self, machine: &Machine) {
        if !self.is_saving {
            lock(&machine.devices.marks).forget_calls_at(BootMark::Frozen as u8);
            self.snapshot = None;
        }
    }

    /// Sends a snapshot when all vCPUs have saved their states, and lets them continue.
    pub(super) fn finish_snapshot(&mut self, machine: &Machine, vcpus: &VcpuThreads) {
        if !self.is_saving {
            return;
        }
        if !vcpus.is_paused() {
            return vcpus.kick();
        }
        self.complete_requests(SNAPSHOT_LIMIT);
        // No device raises an interrupt from here on.
        let saved = vcpus.save();
        if let (Some(control), Some(Requested { number, pauses })) = (&mut self.control, self.snapshot) {
            let result = match (&control.requests, &control.config) {
                (Some(requests), Some(config)) => {
                    let limit = snapshot::time_limit(config.machine.mem_size_mib);
                    let until = std::time::Instant::now() + limit;
                    let mut sink = |offset, part: &[u8]| requests.send_part(number, offset, part, until);
                    snapshot::send(machine, config, saved, &mut sink)
                }
                _ => Err(PrebootError::NotAnImage.into()),
            };
            // A guest that could not be saved continues.
            self.is_paused |= result.is_ok() && pauses;
            let refused = |error| Answer::Refused(with_causes(&error));
            control.end_snapshot(number, &result.map_or_else(refused, |()| Answer::Done));
        }
        (self.is_saving, self.snapshot) = (false, None);
        if !self.is_paused {
            vcpus.resume();
        }
    }

    /// Serves the doorbell that a vCPU's thread rings: the agent accepts connections, or a snapshot is to be taken.
    pub(super) fn serve_doorbell(&mut self, vcpus: &VcpuThreads) {
        self.control.iter_mut().for_each(Control::send_start);
        if vcpus.is_marked() {
            self.is_saving = true;
            vcpus.kick();
        }
    }

    fn serve_query(&mut self, asker: Asker, query: Query, vcpus: &VcpuThreads) {
        let Some(control) = &mut self.control else { return };
        match query {
            Query::Pause => {
                self.is_paused = true;
                vcpus.pause();
                vcpus.kick();
                if !self.pausing.contains(&asker) {
                    self.pausing.push(asker);
                }
            }
            Query::Resume => {
                self.is_paused = false;
                // Otherwise they continue after the snapshot.
                if !self.is_saving {
                    vcpus.resume();
                }
                // Those that wait for a pause have had one.
                self.pausing.drain(..).for_each(|asker| control.answer(asker, Answer::Done));
                control.answer(asker, Answer::Done);
            }
            Query::Statistics => {
                let device_failures =
                    self.devices.iter().filter_map(|device| lock(device).failure()).collect();
                let (is_paused, balloon) = (vcpus.is_paused(), control.balloon_statistics());
                let statistics = Statistics { is_paused, balloon, device_failures };
                control.answer(asker, Answer::Statistics(Box::new(statistics)));
            }
            Query::Detach => control.answer(asker, Answer::Done),
            Query::Snapshot { .. } => {
                control.answer(asker, Answer::Refused("the front cannot receive it".to_owned()))
            }
        }
    }

    /// Answers queries to pause when all vCPUs have left the guest, and interrupts those that have not.
    pub(super) fn finish_pause(&mut self, vcpus: &VcpuThreads) {
        if self.pausing.is_empty() {
            return;
        }
        if vcpus.is_paused() {
            if let Some(control) = &mut self.control {
                self.pausing.drain(..).for_each(|asker| control.answer(asker, Answer::Done));
            }
        } else {
            vcpus.kick();
        }
    }
}
