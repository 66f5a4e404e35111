//! What passes between the lab and its host over one channel: frames of a kind, a length and data.

use std::io::{self, Read, Write};

/// What a frame holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// From the lab: the command's standard output.
    Output = 1,
    /// From the lab: its standard error.
    Error = 2,
    /// From the lab: the name of a file that follows.
    FileName = 3,
    /// From the lab: a part of that file.
    FileData = 4,
    /// From the lab: the command's exit status, one byte. Nothing follows.
    Exit = 5,
    /// From the lab: what it could not do; an exit status follows.
    Failure = 6,
    /// To the lab: standard input; no data at its end.
    Input = 7,
}

/// The longest frame's data in bytes.
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
        return Err(io::Error::new(io::ErrorKind::InvalidData, "not a frame of the lab"));
    };
    let mut data = vec![0; length];
    channel.read_exact(&mut data)?;
    Ok((kind, data))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_survive_and_nonsense_is_refused() {
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
