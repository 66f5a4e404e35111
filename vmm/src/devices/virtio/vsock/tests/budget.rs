//! The budget of one call of the device.

use super::{Guest, HOST_CID, Header, Piece, RW, TX, packet};

#[test]
fn a_call_ends_after_1_mib() {
    const LENGTH: u32 = 64 << 10;
    let mut guest = Guest::new(8);
    let header = Header { len: LENGTH, ..packet(RW, 1000, 80) };
    assert_eq!(header.dst_cid, HOST_CID);
    let bytes = [&header.to_bytes()[..], &[0; LENGTH as usize]].concat();
    for _ in 0..40 {
        guest.driver.push(TX, &[Piece::Out(bytes.clone())]);
    }
    guest.driver.write(0x50, 0);
    assert!(guest.driver.run(Some(0)));
    assert_eq!(std::iter::from_fn(|| guest.driver.pop(TX)).count(), 16, "1 MiB per call");
    guest.driver.ring();
    assert_eq!(std::iter::from_fn(|| guest.driver.pop(TX)).count(), 24);
}
