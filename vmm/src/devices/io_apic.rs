//! The I/O APIC (Intel 82093AA): it translates interrupt lines into messages to the local APICs.
//!
//! KVM emulates an I/O APIC as well, but only together with two 8259 interrupt controllers. A kernel that detects those
//! iterates over all 24 pins several times during the boot, and KVM has to decode the instruction of each register
//! access: 2.5 ms in total (exact lab). Without the 8259 controllers the kernel accesses only the pins that devices
//! use, with about twenty accesses in total, so that the device is emulated in user space. Interrupts do not pass
//! through here: each line is an irqfd, whose message KVM delivers.
//!
//! The kernel reads and writes every pin when it enables x2APIC mode (`enable_IR_x2apic` in
//! arch/x86/kernel/apic/apic.c), so that the number of pins is that of the highest line in use.
//!
//! All lines are edge-triggered. Level-triggered pins would have to receive each end of interrupt in user space, and no
//! device of this machine needs them.

use crate::bus::{BusDevice, GuestRequest};
use crate::layout::{Gsi, IO_APIC_PINS};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::io;

/// A message-signaled interrupt (Intel SDM, volume 3, section 11.11).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message {
    /// The address of the message, which selects the local APICs.
    pub address: u64,
    /// The data of the message: vector and delivery mode.
    pub data: u32,
}

/// The receiver of the messages of all lines.
pub trait MessageSink: Send {
    /// Makes line `n` send `messages[n]`. `None` is a masked line. Called whenever one of the messages changes.
    ///
    /// # Errors
    /// When the host is out of memory.
    fn set(&mut self, messages: &[Option<Message>]) -> io::Result<()>;
}

/// Offsets of the memory-mapped registers (section 3.0).
pub(crate) const SELECT: u16 = 0x00;
const WINDOW: u16 = 0x10;

/// Indices of the registers that are accessed through the window (section 3.2).
const ID: u8 = 0x00;
const VERSION: u8 = 0x01;
const ARBITRATION: u8 = 0x02;
const TABLE: u8 = 0x10;

/// The value of the version register, without the number of the last pin in bits 16 to 23.
const VERSION_NUMBER: u32 = 0x11;

/// Fields of a redirection table entry (section 3.2.4).
mod entry {
    /// Interrupt vector.
    pub(super) const VECTOR: u64 = 0xff;
    /// Delivery mode, bits 8 to 10.
    pub(super) const DELIVERY_MODE: u64 = 0x700;
    /// Destination mode: logical.
    pub(super) const LOGICAL: u64 = 1 << 11;
    /// Delivery status and remote IRR, which software cannot write.
    pub(super) const READ_ONLY: u64 = 1 << 12 | 1 << 14;
    /// Masked.
    pub(super) const MASKED: u64 = 1 << 16;
    /// The lowest bit of the destination.
    pub(super) const DESTINATION: u32 = 56;
}

/// The registers: the complete state of the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// The index of the register that the window accesses.
    pub select: u8,
    /// The identification register.
    pub id: u32,
    /// Number of pins: 1 to 24.
    pub pins: u8,
    /// The redirection table; entries beyond the last pin are unused.
    pub entries: [u64; IO_APIC_PINS as usize],
}

impl State {
    /// The state after a reset: every pin is masked.
    const fn with_pins(pins: u8) -> Self {
        Self { select: 0, id: 0, pins, entries: [entry::MASKED; IO_APIC_PINS as usize] }
    }
}

/// An I/O APIC, with the receiver of its messages.
pub struct IoApic {
    state: State,
    sink: Box<dyn MessageSink>,
}

impl fmt::Debug for IoApic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.state.fmt(f)
    }
}

impl IoApic {
    /// Creates an I/O APIC in its reset state, with the pins 0 to the highest of `lines`.
    #[must_use]
    pub fn new(lines: &[Gsi], sink: Box<dyn MessageSink>) -> Self {
        let highest = lines.iter().map(|line| line.0).max().unwrap_or(0);
        let pins = u8::try_from(highest + 1).unwrap_or(IO_APIC_PINS).min(IO_APIC_PINS);
        Self { state: State::with_pins(pins), sink }
    }

    /// Returns a copy of the registers.
    #[must_use]
    pub const fn state(&self) -> State {
        self.state
    }

    /// Restores saved registers. The number of pins is not restored: it is a property of the machine.
    ///
    /// # Errors
    /// When the host is out of memory.
    pub fn restore(&mut self, state: &State) -> io::Result<()> {
        self.state = State { pins: self.state.pins, ..*state };
        self.sink.set(&self.state.entries.map(message))
    }

    /// The index of the selected redirection table entry, and whether its upper half is selected.
    fn selected_entry(&self) -> Option<(usize, bool)> {
        let register = self.state.select.checked_sub(TABLE)?;
        let index = usize::from(register / 2);
        (index < usize::from(self.state.pins)).then_some((index, register % 2 == 1))
    }

    fn read_register(&self) -> u32 {
        match self.state.select {
            ID | ARBITRATION => self.state.id,
            VERSION => VERSION_NUMBER | u32::from(self.state.pins - 1) << 16,
            _ => self.selected_entry().map_or(u32::MAX, |(index, upper)| {
                let halves = self.state.entries[index].to_le_bytes();
                let [a, b, c, d, e, f, g, h] = halves;
                u32::from_le_bytes(if upper { [e, f, g, h] } else { [a, b, c, d] })
            }),
        }
    }

    fn write_register(&mut self, value: u32) -> Option<GuestRequest> {
        if self.state.select == ID {
            // Bits 24 to 27 are the APIC ID.
            self.state.id = value & 0x0f00_0000;
            return None;
        }
        let (index, upper) = self.selected_entry()?;
        let old = self.state.entries[index];
        let value = u64::from(value);
        let new = if upper {
            old & 0xffff_ffff | value << 32
        } else {
            old & (0xffff_ffff << 32 | entry::READ_ONLY) | value & !entry::READ_ONLY
        };
        self.state.entries[index] = new;
        // Each routing update makes KVM wait for an SRCU grace period, so that writes without effect are not forwarded.
        if message(old) != message(new) {
            // Without its interrupts, the guest would wait for a device for ever.
            let result = self.sink.set(&self.state.entries.map(message));
            return result
                .is_err()
                .then_some(GuestRequest::HostFailed("the host has no memory to route an interrupt"));
        }
        None
    }
}

/// The message of a redirection table entry; `None` when the entry is masked.
fn message(entry: u64) -> Option<Message> {
    const APIC_BASE: u64 = 0xfee0_0000;
    if entry & entry::MASKED != 0 {
        return None;
    }
    let logical = if entry & entry::LOGICAL != 0 { 1 << 2 } else { 0 };
    let data = entry & (entry::VECTOR | entry::DELIVERY_MODE);
    Some(Message {
        address: APIC_BASE | (entry >> entry::DESTINATION) << 12 | logical,
        data: u32::try_from(data).unwrap_or(0),
    })
}

impl BusDevice for IoApic {
    fn read(&mut self, offset: u16, data: &mut [u8]) {
        // Registers are 32 bits wide; other accesses are not defined (section 3.0).
        let Ok(data) = <&mut [u8; 4]>::try_from(data) else { return };
        match offset {
            SELECT => *data = u32::from(self.state.select).to_le_bytes(),
            WINDOW => *data = self.read_register().to_le_bytes(),
            _ => {}
        }
    }

    fn write(&mut self, offset: u16, data: &[u8]) -> Option<GuestRequest> {
        let Ok(data) = <[u8; 4]>::try_from(data) else { return None };
        match offset {
            SELECT => self.state.select = data[0],
            WINDOW => return self.write_register(u32::from_le_bytes(data)),
            _ => {}
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};

    type Log = Arc<Mutex<Vec<Vec<Option<Message>>>>>;

    struct Recorder(Log);

    impl MessageSink for Recorder {
        fn set(&mut self, messages: &[Option<Message>]) -> io::Result<()> {
            self.0.lock().unwrap().push(messages.to_vec());
            Ok(())
        }
    }

    fn device() -> (IoApic, Log) {
        let log = Log::default();
        (IoApic::new(&[Gsi(4), Gsi(23)], Box::new(Recorder(log.clone()))), log)
    }

    fn write(device: &mut IoApic, register: u8, value: u32) {
        device.write(0x00, &u32::from(register).to_le_bytes());
        device.write(0x10, &value.to_le_bytes());
    }

    fn read(device: &mut IoApic, register: u8) -> u32 {
        device.write(0x00, &u32::from(register).to_le_bytes());
        let mut data = [0xff; 4];
        device.read(0x10, &mut data);
        u32::from_le_bytes(data)
    }

    // Register numbers and bits restate the 82093AA datasheet.

    #[test]
    fn a_reset_masks_all_24_pins() {
        let (mut device, log) = device();
        assert_eq!(read(&mut device, 1), 0x0017_0011);
        for pin in 0..24 {
            assert_eq!(read(&mut device, 0x10 + 2 * pin), 0x0001_0000);
            assert_eq!(read(&mut device, 0x11 + 2 * pin), 0);
        }
        assert!(log.lock().unwrap().is_empty());
    }

    #[test]
    fn the_highest_line_determines_the_number_of_pins() {
        let mut device = IoApic::new(&[Gsi(4)], Box::new(Recorder(Log::default())));
        assert_eq!(read(&mut device, 1), 0x0004_0011);
        assert_eq!(read(&mut device, 0x18), 0x0001_0000);
        assert_eq!(read(&mut device, 0x1a), u32::MAX, "there is no sixth pin");
    }

    #[test]
    fn an_unmasked_entry_becomes_a_message() {
        let (mut device, log) = device();
        // To APIC 3, physical, fixed, vector 0x41.
        write(&mut device, 0x19, 0x0300_0000);
        assert!(log.lock().unwrap().is_empty(), "still masked");
        write(&mut device, 0x18, 0x0000_0041);
        let sent = log.lock().unwrap().last().unwrap().clone();
        assert_eq!(sent[4], Some(Message { address: 0xfee0_3000, data: 0x41 }));
        assert_eq!(sent.iter().flatten().count(), 1);
        // The same again changes nothing, lowest priority and logical do.
        write(&mut device, 0x18, 0x0000_0041);
        assert_eq!(log.lock().unwrap().len(), 1);
        write(&mut device, 0x18, 0x0000_0941);
        assert_eq!(
            log.lock().unwrap().last().unwrap()[4],
            Some(Message { address: 0xfee0_3004, data: 0x141 })
        );
        write(&mut device, 0x18, 0x0001_0941);
        assert_eq!(log.lock().unwrap().last().unwrap()[4], None);
    }

    #[test]
    fn read_only_bits_stay() {
        let (mut device, _) = device();
        write(&mut device, 0x10, u32::MAX);
        assert_eq!(read(&mut device, 0x10), !(1 << 12 | 1 << 14));
        write(&mut device, 0, u32::MAX);
        assert_eq!(read(&mut device, 0), 0x0f00_0000);
        write(&mut device, 1, 0);
        assert_eq!(read(&mut device, 1), 0x0017_0011);
    }

    #[test]
    fn any_access_is_harmless() {
        let (mut device, _) = device();
        for offset in [0, 1, 4, 0x10, 0x11, 0x20, 0x40, 0xfff] {
            for width in [0, 1, 2, 3, 4, 8, 4096] {
                device.write(offset, &vec![0xff; width]);
                device.read(offset, &mut vec![0xff; width]);
            }
        }
        for register in 0..=255 {
            write(&mut device, register, 0x5a5a_5a5a);
            read(&mut device, register);
        }
        assert_eq!(read(&mut device, 0x40), u32::MAX, "beyond the last pin");
    }
}
