//! Names of the devices at ports and addresses.

use guest_protocol::port;
use kindling_vmm::layout;

/// The device that an exit accessed, or the device that a PC would have there.
pub(super) fn name(reason: &str, address: u64) -> &'static str {
    const PAGE: u64 = layout::PAGE_SIZE - 1;
    if reason.starts_with("memory") {
        return match address & !PAGE {
            page if page == layout::IO_APIC.0 => "I/O APIC",
            _ => "no device",
        };
    }
    let Ok(number) = u16::try_from(address) else { return "no device" };
    match number {
        port::BOOT_MARK => "boot mark",
        port::EXIT => "exit status",
        port::CONFIG_REQUEST | port::CONFIG_DATA => "configuration",
        layout::KEYBOARD_CONTROLLER_PORT => "keyboard controller",
        layout::RESET_CONTROL_PORT => "reset control",
        layout::RTC_DATA_PORT => "real-time clock",
        number if (layout::SERIAL_PORT..layout::SERIAL_PORT + 8).contains(&number) => "serial port",
        0x20 | 0x21 | 0xa0 | 0xa1 | 0x4d0 | 0x4d1 => "no device (8259)",
        0x40..=0x43 | 0x61 => "no device (timer)",
        0x70 => "no device (real-time clock)",
        0x80..=0x8f => "no device (DMA page)",
        0xcf8 | 0xcfc..=0xcff => "no device (PCI)",
        _ => "no device",
    }
}
