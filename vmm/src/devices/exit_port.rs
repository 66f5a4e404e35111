//! The exit port: a 4-byte write ends the guest with the written status.

use crate::bus::{BusDevice, GuestRequest};
use guest_protocol::ExitStatus;

/// Turns a 4-byte write of an [`ExitStatus`] into [`GuestRequest::End`]; other writes are ignored, and reads return all
/// ones.
#[derive(Debug, Default)]
pub struct ExitPort;

impl BusDevice for ExitPort {
    fn read(&mut self, _offset: u16, _data: &mut [u8]) {}

    fn write(&mut self, _offset: u16, data: &[u8]) -> Option<GuestRequest> {
        let raw = u32::from_le_bytes(data.try_into().ok()?);
        ExitStatus::from_raw(raw).map(GuestRequest::End)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_whole_status_ends_the_guest() {
        let mut port = ExitPort;
        let ended = |code| Some(GuestRequest::End(ExitStatus::Payload(code)));
        assert_eq!(port.write(0, &[3, 0, 0, 0]), ended(3));
        assert_eq!(port.write(0, &[0xff, 0, 0, 0]), ended(255));
        assert_eq!(port.write(0, &[0, 1, 0, 0]), Some(GuestRequest::End(ExitStatus::InitPanic)));
        for data in [&[][..], &[0], &[0, 0], &[0xff; 4], &[0; 8], &[0, 0, 1, 0]] {
            assert_eq!(port.write(0, data), None, "{data:?}");
        }
    }
}
