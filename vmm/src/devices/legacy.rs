//! Two PC chips that are absent, with just enough registers to keep a kernel from waiting for them.
//!
//! A general-purpose kernel probes for a keyboard controller and a real-time clock. Unassigned ports read as all ones.
//! The driver of the real-time clock interprets that as "update in progress" and polls for one second; a reset through
//! the keyboard controller interprets it as "busy" and polls 65,536 times. The values here end both loops in the first
//! iteration. Writes to the two reset registers of a PC end the machine.

use crate::bus::{BusDevice, GuestRequest};

/// Status of the keyboard controller: output buffer full, input buffer empty.
///
/// "Input buffer empty" lets a reset command through without polling. "Output buffer full" on every read makes
/// `i8042_flush` in drivers/input/serio/i8042.c conclude that there is no controller.
const STATUS: u8 = 0x01;
/// The 8042 controller command that pulses the processor's reset line.
const PULSE_RESET: u8 = 0xfe;

/// The status and command register of a keyboard controller that can only reset the machine.
#[derive(Debug, Default)]
pub struct KeyboardController;

impl BusDevice for KeyboardController {
    fn read(&mut self, _offset: u16, data: &mut [u8]) {
        data.fill(STATUS);
    }

    fn write(&mut self, _offset: u16, data: &[u8]) -> Option<GuestRequest> {
        (data == [PULSE_RESET]).then_some(GuestRequest::Reset)
    }
}

/// The reset control register of a PC chipset (Intel ICH9 datasheet, section 13.7.5): bit 2 resets
/// the processor.
#[derive(Debug, Default)]
pub struct ResetControl;

impl BusDevice for ResetControl {
    fn read(&mut self, _offset: u16, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, _offset: u16, data: &[u8]) -> Option<GuestRequest> {
        matches!(data, &[value] if value & 0x04 != 0).then_some(GuestRequest::Reset)
    }
}

/// The data register of a real-time clock whose registers are all zero: no update in progress, and "RAM and time
/// invalid", so that the driver does not register the clock.
#[derive(Debug, Default)]
pub struct AbsentClock;

impl BusDevice for AbsentClock {
    fn read(&mut self, _offset: u16, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, _offset: u16, _data: &[u8]) -> Option<GuestRequest> {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_two_resets_of_a_pc_end_the_machine() {
        assert_eq!(KeyboardController.write(0, &[0xfe]), Some(GuestRequest::Reset));
        assert_eq!(ResetControl.write(0, &[0x06]), Some(GuestRequest::Reset));
        assert_eq!(ResetControl.write(0, &[0x0e]), Some(GuestRequest::Reset));
    }

    #[test]
    fn other_writes_do_not() {
        for data in [&[][..], &[0xd1], &[0xff], &[0xfe, 0], &[0xfe, 0, 0, 0]] {
            assert_eq!(KeyboardController.write(0, data), None, "{data:?}");
        }
        for data in [&[][..], &[0x02], &[0x06, 0], &[0, 0, 0, 0x06]] {
            assert_eq!(ResetControl.write(0, data), None, "{data:?}");
        }
    }
}
