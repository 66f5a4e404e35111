//! The transmit direction: frames from the guest to the host.

use super::{
    BUDGET, Chain, DeviceError, FRAME_MAX, Net, Queues, TX, Wait, header, is_disconnected, is_retryable,
};
use std::io;

impl Net {
    /// Sends frames to the host until the direction has to wait.
    pub(super) fn transmit(&mut self, queues: &mut Queues) -> Result<(), DeviceError> {
        self.tx.wait = self.transmit_frames(queues)?;
        queues.notify(TX)
    }

    fn transmit_frames(&mut self, queues: &mut Queues) -> Result<Wait, DeviceError> {
        for _ in 0..BUDGET {
            let Some(mut chain) = queues.pop(TX)? else {
                if queues.enable_notification(TX)? {
                    continue;
                }
                return Ok(Wait::Driver);
            };
            if let Err(until) = self.tx.limiter.ready() {
                queues.undo_pop(TX, chain);
                return Ok(Wait::Limiter(until));
            }
            let length = chain.readable_len().saturating_sub(header::LENGTH as u64);
            match self.send(&mut chain, length) {
                Err(error) if is_retryable(&error) => {
                    queues.undo_pop(TX, chain);
                    return Ok(Wait::Link);
                }
                Ok(()) => {}
                Err(error) => {
                    self.tx.dropped += 1;
                    if is_disconnected(&error) {
                        self.disconnect(queues);
                    }
                }
            }
            self.tx.limiter.charge(length);
            queues.complete(TX, chain, 0)?;
        }
        queues.reschedule();
        Ok(Wait::Rescheduled)
    }

    fn send(&mut self, chain: &mut Chain, length: u64) -> io::Result<()> {
        if !self.is_up {
            return Err(io::ErrorKind::NotConnected.into());
        }
        if !(header::ETHERNET as u64..=FRAME_MAX as u64).contains(&length) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        self.link.send(chain)
    }
}
