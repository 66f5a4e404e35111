//! Snapshots: the machine is saved while all processes are frozen, and each of its copies continues there.

use super::Agent;
use super::session::Session;
use super::{connections, freezer};
use crate::console::print;
use crate::{configuration, machine, renewal};
use guest_protocol::BootMark;
use guest_protocol::agent;

/// Exit status of a snapshot that could not be taken.
const FAILED: u8 = 1;

impl Agent {
    /// Freezes all processes, if a host has requested a snapshot, and lets them run again, here and in each copy.
    #[inline(never)]
    pub(super) fn take_snapshot(&mut self) {
        let is_requested = |entry: &mut Option<Session>| {
            entry.as_mut().is_some_and(|session| core::mem::take(&mut session.requests_snapshot))
        };
        let Some(slot) = self.sessions.iter_mut().position(is_requested) else { return };
        let frozen = match freezer::freeze() {
            Ok(frozen) => frozen,
            Err(error) => {
                print(format_args!("init: cannot freeze the processes for a snapshot: {error}\n"));
                return self.with_session(slot, |session, epoll| session.end(FAILED, epoll));
            }
        };
        connections::close_all();
        renewal::prepare();
        machine::mark(BootMark::Frozen);
        let configuration = configuration::read();
        let Some(reseed) = &configuration.boot.reseed else {
            frozen.thaw();
            return self.with_session(slot, |session, epoll| session.end(0, epoll));
        };
        // A copy, which has none of the connections.
        let guest = &configuration.guest;
        renewal::apply(reseed, guest);
        self.pending.clear();
        for slot in 0..self.sessions.len() {
            self.with_session(slot, |session, _| session.detach());
        }
        if !guest.arguments.is_empty() {
            // The process of the earlier payload runs on, if it has not ended.
            let is_payload = |session: &Session| session.token == agent::PAYLOAD;
            self.sessions
                .iter_mut()
                .filter(|entry| entry.as_ref().is_some_and(is_payload))
                .for_each(|entry| *entry = None);
        }
        frozen.thaw();
        self.begin(guest);
    }
}
