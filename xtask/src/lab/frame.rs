//! The frames exchanged by the lab and its host over one channel: a kind, a length and data.

use std::io::{self, Read, Write};

/// The kind of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// From the lab: the command's standard output.
    Output = 1,
    /// From the lab: the command's standard error.
    Error = 2,
    /// From the lab: the name of a file, whose data follows.
    FileName = 3,
    /// From the lab: a chunk of that file.
    FileData = 4,
    /// From the lab: the command's exit status, one byte; the last frame.
    Exit = 5,
    /// From the lab: an error message of its init, instead of an exit status.
    Failure = 6,
    /// To the lab: standard input; an empty frame is its end.
    Input = 7,
}

/// The maximum length of a frame's data in bytes.
pub(crate) const DATA_MAX: usize = 64 * 1024;

impl Kind {
    const ALL: [Self; 7] =
        [Self::Output, Self::Error, Self::FileName, Self::FileData, Self::Exit, Self::Failure, Self::Input];
}

/// Writes one frame.
pub(crate) fn write(channel: &mut impl Write, kind: Kind, data: &[u8]) -> io::Result<()> {
    let length = u32::try_from(data.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let mut frame = vec![kind as u8];
    frame.extend(length.to_le_bytes());
    frame.extend(data);
    channel.write_all(&frame)?;
    channel.flush()
}

/// Reads one frame.
pub(crate) fn read(channel: &mut impl Read) -> io::Result<(Kind, Vec<u8>)> {
    let mut header = [0; 5];
    channel.read_exact(&mut header)?;
    let kind = Kind::ALL.into_iter().find(|&kind| kind as u8 == header[0]);
    let length = u32::from_le_bytes([header[1], header[2], header[3], header[4]]);
    let length = usize::try_from(length).ok().filter(|&length| length <= DATA_MAX);
    let (Some(kind), Some(length)) = (kind, length) else {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "malformed frame from the lab"));
    };
    let mut data = vec![0; length];
    channel.read_exact(&mut data)?;
    Ok((kind, data))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_read_as_written_and_malformed_ones_are_errors() {
        let mut bytes = Vec::new();
        for kind in Kind::ALL {
            write(&mut bytes, kind, b"data").unwrap();
        }
        let mut rest = &bytes[..];
        for kind in Kind::ALL {
            assert_eq!(read(&mut rest).unwrap(), (kind, b"data".to_vec()));
        }
        assert!(read(&mut rest).is_err());
        assert!(read(&mut &[9, 0, 0, 0, 0][..]).is_err());
        assert!(read(&mut &[1, 0xff, 0xff, 0xff, 0xff][..]).is_err());
    }
}
