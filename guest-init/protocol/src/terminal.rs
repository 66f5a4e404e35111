//! Terminals.

/// Rows and columns of a terminal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct TerminalSize {
    /// Number of lines.
    pub rows: u16,
    /// Characters per line.
    pub columns: u16,
}

impl TerminalSize {
    /// Encodes the size.
    #[must_use]
    pub const fn to_bytes(self) -> [u8; 4] {
        let ([a, b], [c, d]) = (self.rows.to_le_bytes(), self.columns.to_le_bytes());
        [a, b, c, d]
    }

    /// Decodes the size.
    #[must_use]
    pub const fn from_bytes([a, b, c, d]: [u8; 4]) -> Self {
        Self { rows: u16::from_le_bytes([a, b]), columns: u16::from_le_bytes([c, d]) }
    }
}
