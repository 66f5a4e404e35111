//! What the payload of `cargo xtask bench --scenario io` and whoever starts it agree on.
//!
//! The payload's argument is how often it does each operation. It does those for whose device it finds, and then
//! says on one line for each of them its name and the nanoseconds of all repetitions on the guest's clock, and at
//! last [`END`]. At the beginning and end of the repetitions it writes to [`MARK_PORT`], which no monitor
//! answers, but which KVM's tracepoints show.

/// The port of a PC's power-on codes.
pub const MARK_PORT: u16 = 0x80;
/// Written there when an operation has been repeated; its number is written before.
pub const DONE: u8 = 0xff;
/// What the payload says at the end.
pub const END: &str = "all operations are done";
/// Bytes of the disk that it reads and overwrites.
pub const DISK_BYTES: u64 = 32 << 20;

/// What is done with a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Operation {
    /// 4 KiB of the disk, anywhere.
    BlockRead4k,
    /// The same, 32 at a time.
    BlockRead4kDepth32,
    /// 4 KiB to the disk, anywhere.
    BlockWrite4k,
    /// The same, 32 at a time.
    BlockWrite4kDepth32,
    /// 128 KiB of the disk, one after the other.
    BlockRead128k,
    /// 128 KiB to the disk, one after the other.
    BlockWrite128k,
}

impl Operation {
    /// All of them, in the order in which they are done.
    pub const ALL: [Self; 6] = [
        Self::BlockRead4k,
        Self::BlockRead4kDepth32,
        Self::BlockWrite4k,
        Self::BlockWrite4kDepth32,
        Self::BlockRead128k,
        Self::BlockWrite128k,
    ];

    /// What the payload and the bench's rows call it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::BlockRead4k => "block_read_4k",
            Self::BlockRead4kDepth32 => "block_read_4k_depth_32",
            Self::BlockWrite4k => "block_write_4k",
            Self::BlockWrite4kDepth32 => "block_write_4k_depth_32",
            Self::BlockRead128k => "block_read_128k",
            Self::BlockWrite128k => "block_write_128k",
        }
    }

    /// What a table's column is called.
    #[must_use]
    pub const fn title(self) -> &'static str {
        match self {
            Self::BlockRead4k => "read 4k",
            Self::BlockRead4kDepth32 => "read 4k x32",
            Self::BlockWrite4k => "write 4k",
            Self::BlockWrite4kDepth32 => "write 4k x32",
            Self::BlockRead128k => "read 128k",
            Self::BlockWrite128k => "write 128k",
        }
    }

    /// How often it is done where 4 KiB are asked for so often: as many bytes of longer ones say no more.
    #[must_use]
    pub const fn repetitions(self, count: u32) -> u32 {
        match self {
            Self::BlockRead128k | Self::BlockWrite128k => count.div_ceil(8),
            _ => count,
        }
    }

    /// The operation with this number, as it is written to [`MARK_PORT`].
    #[must_use]
    pub fn from_number(number: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|&operation| operation as u8 == number)
    }

    /// The operation of this name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|operation| operation.name() == name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operations_have_numbers_and_names_of_their_own() {
        for (number, operation) in (0..).zip(Operation::ALL) {
            assert_eq!(Operation::from_number(number), Some(operation));
            assert_eq!(Operation::from_name(operation.name()), Some(operation));
        }
        assert_eq!(Operation::from_number(DONE), None);
        assert_eq!(Operation::from_name(END), None);
    }
}
