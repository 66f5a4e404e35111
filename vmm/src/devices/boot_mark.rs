//! The boot-mark port: a 1-byte write reports that the guest has reached a boot stage.

use crate::bus::{BusDevice, GuestRequest};
use crate::timeline::Instant;
use std::fmt;

/// A boot mark and its time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mark {
    /// The byte that the guest wrote.
    pub stage: u8,
    /// When the write reached the VMM.
    pub at: Instant,
}

/// Records the first [`Self::CAPACITY`] marks.
#[derive(Debug, Default)]
pub struct BootMarks {
    marks: Vec<Mark>,
    /// The stage at which the machine stops, to be captured.
    capture_at: Option<u8>,
    /// Callbacks for the first mark of a stage.
    actions: Vec<(u8, Action)>,
}

struct Action(Box<dyn FnOnce() + Send>);

impl fmt::Debug for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Action")
    }
}

impl BootMarks {
    /// Number of marks that are recorded: a boot writes a handful. Further marks are dropped.
    pub const CAPACITY: usize = 64;

    /// Creates a device that requests the capture of the machine when the guest reaches `stage`.
    #[must_use]
    pub const fn capturing_at(stage: u8) -> Self {
        Self { marks: Vec::new(), capture_at: Some(stage), actions: Vec::new() }
    }

    /// Registers a callback for the first mark of `stage`. It runs on the vCPU's thread, before the guest continues.
    pub fn call_at(&mut self, stage: u8, action: impl FnOnce() + Send + 'static) {
        self.actions.push((stage, Action(Box::new(action))));
    }

    /// Removes the callbacks for `stage`.
    pub fn forget_calls_at(&mut self, stage: u8) {
        self.actions.retain(|(at, _)| *at != stage);
    }

    /// The marks recorded so far, in the order of arrival.
    #[must_use]
    pub fn marks(&self) -> &[Mark] {
        &self.marks
    }
}

impl BusDevice for BootMarks {
    fn read(&mut self, _offset: u16, _data: &mut [u8]) {}

    fn write(&mut self, _offset: u16, data: &[u8]) -> Option<GuestRequest> {
        if let &[stage] = data {
            if self.marks.len() < Self::CAPACITY {
                self.marks.push(Mark { stage, at: Instant::now() });
            }
            for (_, Action(action)) in self.actions.extract_if(.., |(at, _)| *at == stage) {
                action();
            }
            return (self.capture_at == Some(stage)).then_some(GuestRequest::Capture);
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_are_kept_up_to_a_bound() {
        let mut device = BootMarks::default();
        for _ in 0..10_000 {
            assert_eq!(device.write(0, &[0x10]), None);
        }
        assert_eq!(device.marks().len(), BootMarks::CAPACITY);
        assert_eq!(device.marks()[0].stage, 0x10);
    }

    #[test]
    fn one_mark_requests_the_capture_of_the_machine() {
        let mut device = BootMarks::capturing_at(0x11);
        assert_eq!(device.write(0, &[0x10]), None);
        assert_eq!(device.write(0, &[0x11]), Some(GuestRequest::Capture));
    }

    #[test]
    fn one_mark_has_an_action_once() {
        let (sender, calls) = std::sync::mpsc::channel();
        let mut device = BootMarks::default();
        device.call_at(0x11, move || sender.send(()).unwrap());
        let mut calls_after = |stage| {
            device.write(0, &[stage]);
            calls.try_iter().count()
        };
        assert_eq!([0x10, 0x11, 0x11].map(&mut calls_after), [0, 1, 0]);
    }

    #[test]
    fn wider_writes_are_no_marks() {
        let mut device = BootMarks::default();
        for data in [&[][..], &[1, 2], &[1, 2, 3, 4]] {
            device.write(0, data);
        }
        assert!(device.marks().is_empty());
    }
}
