//! temp
#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Serialize)]
pub struct MacAddr(u64);
impl MacAddr {
    pub fn from_u64(x: u64) -> Self {
        Self(x)
    }
    pub fn to_u64(self) -> u64 {
        self.0
    }
    pub fn is_multicast(self) -> bool {
        self.0 >> 40 & 1 == 1
    }
    pub fn is_zero(self) -> bool {
        self.0 == 0
    }
}
