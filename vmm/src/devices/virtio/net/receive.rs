//! The receive direction: frames from the host to the guest.
//!
//! A tap device does not report the length of the next frame, and a frame can have 64 KiB, which are about forty
//! receive buffers of Linux. Most frames are short: the link gets space for a short frame, and uses its own buffer for
//! the rest of a long one. While long frames arrive, it gets space for the longest frame, so that bulk streams are not
//! copied twice.

use super::buffers::Frame;
use super::{BUDGET, DeviceError, FRAME_MAX, Net, Queues, RX, Wait, header, is_retryable};

/// Length of a frame with Ethernet's usual MTU and a VLAN tag. One receive buffer of Linux holds such a frame.
const SHORT: usize = 1500 + header::ETHERNET + 4;
/// Number of consecutive short frames after which no long frame is expected: acknowledgments of a stream in the
/// opposite direction arrive between the frames of a stream.
const SHORT_IN_A_ROW: u8 = 8;

/// The expected length of the next frame.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct SizeHint {
    /// Number of consecutive short frames until only short ones are expected.
    expects_long: u8,
}

impl SizeHint {
    const fn length(self) -> usize {
        if self.expects_long > 0 { FRAME_MAX } else { SHORT }
    }

    const fn update(&mut self, length: usize) {
        self.expects_long = if length > SHORT { SHORT_IN_A_ROW } else { self.expects_long.saturating_sub(1) };
    }
}

impl Net {
    /// Delivers frames to the driver until the direction has to wait.
    pub(super) fn receive(&mut self, queues: &mut Queues) -> Result<(), DeviceError> {
        self.rx.wait = self.receive_frames(queues)?;
        queues.notify(RX)
    }

    fn receive_frames(&mut self, queues: &mut Queues) -> Result<Wait, DeviceError> {
        for _ in 0..BUDGET {
            if self.frame.is_none()
                && let Some(wait) = self.take_frame(queues)?
            {
                return Ok(wait);
            }
            if let Some(frame) = self.frame
                && !self.deliver(frame, queues)?
            {
                return Ok(Wait::Driver);
            }
        }
        queues.reschedule();
        Ok(Wait::Rescheduled)
    }

    /// Receives a frame from the link; returns the event to wait for when there is none. An invalid frame is dropped.
    fn take_frame(&mut self, queues: &mut Queues) -> Result<Option<Wait>, DeviceError> {
        if !self.is_up {
            return Ok(Some(Wait::Driver));
        }
        if let Err(until) = self.rx.limiter.ready() {
            return Ok(Some(Wait::Limiter(until)));
        }
        let expected = self.size_hint.length();
        while !self.buffers.gather(expected, queues)? && self.buffers.count() == 0 {
            // Without receive buffers the frame stays in the link.
            if !queues.enable_notification(RX)? {
                return Ok(Some(Wait::Driver));
            }
        }
        self.buffers.list(expected, &mut self.space);
        match self.link.receive(&self.space) {
            Ok(Some(frame)) => {
                let length = frame.placed + self.link.rest().len();
                self.size_hint.update(length);
                self.rx.limiter.charge(length as u64);
                self.frame = Some(frame);
            }
            Ok(None) => self.rx.dropped += 1,
            Err(error) if is_retryable(&error) => return Ok(Some(Wait::Link)),
            Err(_) => self.disconnect(queues),
        }
        Ok(None)
    }

    /// Delivers the frame to the driver, or drops it; `false` when there are too few receive buffers.
    fn deliver(&mut self, frame: Frame, queues: &mut Queues) -> Result<bool, DeviceError> {
        let rest = self.link.rest();
        let length = frame.placed + rest.len();
        while !self.buffers.gather(length, queues)? {
            // The driver has made its whole queue available; more buffers will not come.
            if self.buffers.count() >= queues.size(RX) {
                break;
            }
            if !queues.enable_notification(RX)? {
                return Ok(false);
            }
        }
        match frame.header.for_driver(self.features) {
            Some(header) if self.buffers.max_frame() >= (header::LENGTH + length) as u64 => {
                self.buffers.deliver(Frame { header, ..frame }, rest, queues)?;
            }
            _ => self.rx.dropped += 1,
        }
        self.frame = None;
        self.link.release();
        Ok(true)
    }
}
