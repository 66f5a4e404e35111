//! Frames from the host.
//!
//! A tap does not say how long its next frame is, and a frame can be of 64 KiB, some forty buffers of Linux's. Most
//! are short: the link gets room for a short frame, and has a place of its own for the rest of a long one. Where long
//! frames come, it gets room for any, so that bulk streams are not copied twice.

use super::buffers::Frame;
use super::{BUDGET, Broken, FRAME_MAX, Net, Queues, RX, Wait, header, is_to_be_repeated};

/// Bytes of a frame of Ethernet's usual packets, with the number of a VLAN. Linux's buffers have room for one.
const SHORT: usize = 1500 + header::ETHERNET + 4;
/// Short frames after which long ones are not expected any more: the acknowledgements of a stream the other way come
/// between the frames of one.
const SHORT_IN_A_ROW: u8 = 8;

/// What may come next.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Expectation {
    /// Short frames until it is short ones only.
    long: u8,
}

impl Expectation {
    const fn length(self) -> usize {
        if self.long > 0 { FRAME_MAX } else { SHORT }
    }

    const fn learn(&mut self, length: usize) {
        self.long = if length > SHORT { SHORT_IN_A_ROW } else { self.long.saturating_sub(1) };
    }
}

impl Net {
    /// Moves frames to the driver until it has to wait.
    pub(super) fn receive(&mut self, queues: &mut Queues) -> Result<(), Broken> {
        self.rx.wait = self.receive_frames(queues)?;
        queues.notify(RX)
    }

    fn receive_frames(&mut self, queues: &mut Queues) -> Result<Wait, Broken> {
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
        queues.yield_turn();
        Ok(Wait::Turn)
    }

    /// Takes a frame from the link, if there is one that is of use, or says what to wait for.
    fn take_frame(&mut self, queues: &mut Queues) -> Result<Option<Wait>, Broken> {
        if !self.is_up {
            return Ok(Some(Wait::Driver));
        }
        if let Err(until) = self.rx.limiter.ready() {
            return Ok(Some(Wait::Limiter(until)));
        }
        let expected = self.expectation.length();
        while !self.buffers.gather(expected, queues)? && self.buffers.count() == 0 {
            // A frame that nobody has room for waits where it is.
            if !queues.rearm(RX)? {
                return Ok(Some(Wait::Driver));
            }
        }
        self.buffers.list(expected, &mut self.room);
        match self.link.receive(&self.room) {
            Ok(Some(frame)) => {
                let length = frame.placed + self.link.rest().len();
                self.expectation.learn(length);
                self.rx.limiter.charge(length as u64);
                self.frame = Some(frame);
            }
            Ok(None) => self.rx.dropped += 1,
            Err(error) if is_to_be_repeated(&error) => return Ok(Some(Wait::Link)),
            Err(_) => self.disconnect(queues),
        }
        Ok(None)
    }

    /// Gives the frame to the driver, or drops it; `false` when that has to wait for buffers.
    fn deliver(&mut self, frame: Frame, queues: &mut Queues) -> Result<bool, Broken> {
        let rest = self.link.rest();
        let length = frame.placed + rest.len();
        while !self.buffers.gather(length, queues)? {
            // Where the driver has given all that it can, more will not come.
            if self.buffers.count() >= queues.size(RX) {
                break;
            }
            if !queues.rearm(RX)? {
                return Ok(false);
            }
        }
        match frame.header.for_driver(self.features) {
            Some(header) if self.buffers.longest() >= (header::LENGTH + length) as u64 => {
                self.buffers.deliver(Frame { header, ..frame }, rest, queues)?;
            }
            _ => self.rx.dropped += 1,
        }
        self.frame = None;
        self.link.release();
        Ok(true)
    }
}
