//! The MP table, which describes processors and interrupt lines (Intel MultiProcessor Specification 1.4). It replaces
//! ACPI.

use super::Hardware;
use crate::config::InterruptControllers;
use crate::layout::{self, MP_TABLE};
use crate::memory::{GuestMemory, MemoryError};

/// Version 1.4 (section 4.1).
const SPECIFICATION: u8 = 4;
/// The value of the version register of KVM's local APICs and I/O APIC (integrated APIC).
const APIC_VERSION: u8 = 0x14;
const ISA_BUS: u8 = 0;

/// Entry types (section 4.3).
const PROCESSOR: u8 = 0;
const BUS: u8 = 1;
const IO_APIC: u8 = 2;
const IO_INTERRUPT: u8 = 3;
const LOCAL_INTERRUPT: u8 = 4;

/// Interrupt types (section 4.3.4).
const VECTORED: u8 = 0;
const NMI: u8 = 1;
const EXTERNAL: u8 = 3;
const EVERY_APIC: u8 = 0xff;

/// Writes the MP table of a machine.
pub(super) fn write(memory: &GuestMemory, hardware: Hardware<'_>) -> Result<(), MemoryError> {
    memory.write(MP_TABLE, &table(hardware))
}

/// The floating pointer structure, followed by the configuration table.
fn table(hardware: Hardware<'_>) -> Vec<u8> {
    let entries = entries(hardware);
    let count = u16::try_from(entries.len()).unwrap_or(0);
    let body = entries.concat();
    let mut configuration = configuration_header(body.len(), count);
    configuration.extend(body);
    configuration[7] = checksum(&configuration);

    let mut bytes = floating_pointer();
    bytes.extend(configuration);
    bytes
}

const FLOATING_POINTER_LEN: u64 = 16;

/// The structure that the kernel searches for (section 4.1).
fn floating_pointer() -> Vec<u8> {
    let table = u32::try_from(MP_TABLE.0 + FLOATING_POINTER_LEN).unwrap_or(0);
    let mut bytes = b"_MP_".to_vec();
    bytes.extend(table.to_le_bytes());
    // Length in units of 16 bytes, version, checksum, no default configuration, no IMCR.
    bytes.extend([1, SPECIFICATION, 0, 0, 0, 0, 0, 0]);
    bytes[10] = checksum(&bytes);
    bytes
}

/// The header of the configuration table (section 4.2) with a checksum of zero.
fn configuration_header(body: usize, count: u16) -> Vec<u8> {
    const LEN: usize = 44;
    let length = u16::try_from(LEN + body).unwrap_or(0);
    let local_apic = u32::try_from(layout::LOCAL_APIC.0).unwrap_or(0);
    let mut bytes = b"PCMP".to_vec();
    bytes.extend(length.to_le_bytes());
    bytes.extend([SPECIFICATION, 0]);
    bytes.extend(b"KINDLING");
    bytes.extend(b"MICROVM     ");
    bytes.extend([0; 6]);
    bytes.extend(count.to_le_bytes());
    bytes.extend(local_apic.to_le_bytes());
    bytes.extend([0; 4]);
    debug_assert_eq!(bytes.len(), LEN);
    bytes
}

fn entries(hardware: Hardware<'_>) -> Vec<Vec<u8>> {
    // The id of the I/O APIC follows those of the processors.
    let io_apic = hardware.vcpus;
    let mut entries: Vec<Vec<u8>> = (0..hardware.vcpus).map(processor).collect();
    entries.push([&[BUS, ISA_BUS][..], b"ISA   "].concat());
    let address = u32::try_from(layout::IO_APIC.0).unwrap_or(0).to_le_bytes();
    entries.push([&[IO_APIC, io_apic, APIC_VERSION, 1][..], &address].concat());
    // Each line is the ISA interrupt of the same number, edge-triggered. The kernel sets up every entry, so that only
    // lines with a device are listed.
    entries.extend(hardware.lines.iter().filter_map(|line| {
        let pin = u8::try_from(line.0).ok()?;
        Some(interrupt(IO_INTERRUPT, VECTORED, pin, io_apic, pin))
    }));
    if hardware.controllers == InterruptControllers::Pc {
        entries.push(interrupt(LOCAL_INTERRUPT, EXTERNAL, 0, 0, 0));
    }
    entries.push(interrupt(LOCAL_INTERRUPT, NMI, 0, EVERY_APIC, 1));
    entries
}

fn processor(id: u8) -> Vec<u8> {
    const ENABLED: u8 = 1;
    const BOOTSTRAP: u8 = 2;
    let flags = if id == 0 { ENABLED | BOOTSTRAP } else { ENABLED };
    // Signature and feature flags are zero, because kernels use CPUID. Eight bytes are reserved.
    let mut bytes = vec![PROCESSOR, id, APIC_VERSION, flags];
    bytes.resize(20, 0);
    bytes
}

/// An interrupt entry: bus line `line` is connected to pin `pin` of APIC `apic`; polarity and trigger mode are those of
/// the bus.
fn interrupt(entry: u8, kind: u8, line: u8, apic: u8, pin: u8) -> Vec<u8> {
    vec![entry, kind, 0, 0, ISA_BUS, line, apic, pin]
}

/// The byte that makes the sum of all bytes zero.
fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0_u8, |sum, byte| sum.wrapping_sub(*byte))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::Gsi;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    fn hardware(vcpus: u8, controllers: InterruptControllers) -> Hardware<'static> {
        Hardware { vcpus, lines: &[Gsi(4), Gsi(5), Gsi(23)], devices: 0, controllers }
    }

    #[test]
    fn structures_and_sums_are_those_of_the_specification() {
        for (vcpus, controllers, local) in [
            (1, InterruptControllers::IoApic, 1),
            (2, InterruptControllers::Pc, 2),
            (16, InterruptControllers::Pc, 2),
        ] {
            let bytes = table(hardware(vcpus, controllers));
            assert_eq!(bytes[..4], *b"_MP_");
            assert_eq!(sum(&bytes[..16]), 0);
            assert_eq!(u32::from_le_bytes(bytes[4..8].try_into().unwrap()), 0x9_fc10);
            let configuration = &bytes[16..];
            assert_eq!(configuration[..4], *b"PCMP");
            let length = u16::from_le_bytes([configuration[4], configuration[5]]);
            assert_eq!(usize::from(length), configuration.len());
            assert_eq!(sum(configuration), 0);
            let count = u16::from_le_bytes([configuration[34], configuration[35]]);
            assert_eq!(count, u16::from(vcpus) + 1 + 1 + 3 + local);
            assert_eq!(configuration.len(), 44 + 20 * usize::from(vcpus) + 8 * (5 + usize::from(local)));
        }
    }

    #[test]
    fn lines_are_connected_to_pins_of_the_same_number() {
        let entries = entries(hardware(1, InterruptControllers::IoApic));
        // Type 3, vectored, conforming to the bus, bus 0 line n, APIC 1 pin n (section 4.3.4).
        assert_eq!(entries[3], [3, 0, 0, 0, 0, 4, 1, 4]);
        assert_eq!(entries[5], [3, 0, 0, 0, 0, 23, 1, 23]);
    }

    #[test]
    fn the_largest_table_fits_into_the_memory_map() {
        let lines: Vec<Gsi> = (0..u32::from(layout::IO_APIC_PINS)).map(Gsi).collect();
        let hardware = Hardware {
            vcpus: layout::VCPUS_MAX,
            lines: &lines,
            devices: 0,
            controllers: InterruptControllers::Pc,
        };
        assert!(table(hardware).len() as u64 <= layout::MP_TABLE_MAX);
    }
}
