//! temp
pub mod ethernet;
use ethernet::MacAddr;
#[derive(Debug, PartialEq, Clone, Copy)]
pub enum ParseError {
    NeedMore,
    Bad,
}
#[derive(Clone, Copy)]
pub struct L2 {
    pub dst_mac: MacAddr,
    pub src_mac: MacAddr,
    vid: Option<u16>,
}
impl L2 {
    pub fn vid(&self) -> Option<u16> {
        self.vid
    }
}
#[derive(Clone, Copy)]
pub struct Headers;
pub fn parse_l2(s: &[u8]) -> Result<L2, ParseError> {
    let (Some(d), Some(x), Some(t)) = (s.get(0..6), s.get(6..12), s.get(12..14)) else {
        return Err(ParseError::NeedMore);
    };
    let m = |b: &[u8]| b.iter().fold(0u64, |a, &x| a << 8 | u64::from(x));
    let vid = if t == [0x81, 0] { s.get(14..16).map(|v| (m(v) as u16) & 0xfff) } else { None };
    Ok(L2 { dst_mac: MacAddr::from_u64(m(d)), src_mac: MacAddr::from_u64(m(x)), vid })
}
pub fn parse(_: &[u8], _: u32) -> Result<Headers, ParseError> {
    Ok(Headers)
}
pub fn flow_hash(_: &[u8]) -> u32 {
    0
}
