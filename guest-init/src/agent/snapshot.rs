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
        let request =
            |entry: &mut Option<Session>| entry.as_mut().and_then(|session| session.requests_snapshot.take());
        let mut requests = self.sessions.iter_mut().map(request).enumerate();
        let Some((slot, continues)) = requests.find_map(|(slot, request)| Some((slot, request?))) else {
            return;
        };
        let frozen = match freezer::freeze() {
            Ok(frozen) => frozen,
            Err(error) => {
                print(format_args!("init: cannot freeze the processes for a snapshot: {error}\n"));
                return self.with_session(slot, |session, epoll| session.end(FAILED, epoll));
            }
        };
        if !continues {
            connections::close_all();
        }
        renewal::prepare();
        machine::mark(BootMark::Frozen);
        let configuration = configuration::read();
        let guest = &configuration.guest;
        match &configuration.boot.reseed {
            None => {
                frozen.thaw();
                self.with_session(slot, |session, epoll| session.end(0, epoll));
            }
            Some(reseed) => {
                renewal::apply(reseed, guest);
                if continues {
                    connections::close_all();
                }
                self.leave_host(!guest.arguments.is_empty());
                frozen.thaw();
                self.begin(guest);
            }
        }
    }

    /// Forgets the host of the guest that was saved, in a copy. The payload runs on for another host, unless the copy has a payload of
    /// its own: then its process, if it has not ended, runs on without a host.
    fn leave_host(&mut self, has_payload: bool) {
        self.pending.clear();
        for slot in 0..self.sessions.len() {
            self.with_session(slot, |session, _| match session.token {
                agent::PAYLOAD if !has_payload => session.await_host(),
                _ => session.detach(),
            });
        }
        if has_payload {
            let is_payload = |session: &Session| session.token == agent::PAYLOAD;
            let payloads = self.sessions.iter_mut().filter(|entry| entry.as_ref().is_some_and(is_payload));
            payloads.for_each(|entry| *entry = None);
        }
    }
}
