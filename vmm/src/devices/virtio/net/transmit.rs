//! Frames to the host.

use super::{BUDGET, Broken, Chain, FRAME_MAX, Net, Queues, TX, Wait, header, is_end, is_to_be_repeated};
use std::io;

impl Net {
    /// Moves frames to the host until it has to wait.
    pub(super) fn transmit(&mut self, queues: &mut Queues) -> Result<(), Broken> {
        self.tx.wait = self.transmit_frames(queues)?;
        queues.notify(TX)
    }

    fn transmit_frames(&mut self, queues: &mut Queues) -> Result<Wait, Broken> {
        for _ in 0..BUDGET {
            let Some(mut chain) = queues.pop(TX)? else {
                if queues.rearm(TX)? {
                    continue;
                }
                return Ok(Wait::Driver);
            };
            if let Err(until) = self.tx.limiter.ready() {
                queues.put_back(TX, chain);
                return Ok(Wait::Limiter(until));
            }
            let length = chain.readable_len().saturating_sub(header::LENGTH as u64);
            match self.send(&mut chain, length) {
                Err(error) if is_to_be_repeated(&error) => {
                    queues.put_back(TX, chain);
                    return Ok(Wait::Link);
                }
                Ok(()) => {}
                Err(error) => {
                    self.tx.dropped += 1;
                    if is_end(&error) {
                        self.disconnect(queues);
                    }
                }
            }
            self.tx.limiter.charge(length);
            queues.complete(TX, chain, 0)?;
        }
        queues.yield_turn();
        Ok(Wait::Turn)
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
