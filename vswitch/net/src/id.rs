//! Newtypes for ids. All are small integers that index arrays of the data path.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A port of the switch: where it sends and receives. An index into the snapshot's port array.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct PortId(pub u16);

/// A network of the snapshot: an index that is its own until it is removed, and nobody's for a while after.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NetworkIndex(pub u16);

/// A peer of the snapshot: another node's VTEP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PeerIndex(pub u16);

impl PortId {
    /// The index as an array position.
    pub fn index(self) -> usize {
        usize::from(self.0)
    }
}

impl NetworkIndex {
    /// The index as an array position.
    pub fn index(self) -> usize {
        usize::from(self.0)
    }
}

impl PeerIndex {
    /// The index as an array position.
    pub fn index(self) -> usize {
        usize::from(self.0)
    }
}

impl fmt::Display for PortId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A VXLAN network identifier: 24 bits (RFC 7348 section 5).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub struct Vni(u32);

/// A number that does not fit a VNI.
#[derive(Debug, PartialEq, Eq)]
pub struct VniError(u32);

impl Vni {
    /// The VNI as its number, below 2^24.
    pub fn number(self) -> u32 {
        self.0
    }
}

impl TryFrom<u32> for Vni {
    type Error = VniError;

    fn try_from(number: u32) -> Result<Vni, VniError> {
        if number < 1 << 24 { Ok(Vni(number)) } else { Err(VniError(number)) }
    }
}

impl From<Vni> for u32 {
    fn from(vni: Vni) -> u32 {
        vni.0
    }
}

impl fmt::Display for Vni {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for VniError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} is no VNI: allowed are 0 to 16777215", self.0)
    }
}

impl std::error::Error for VniError {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vni_is_24_bits() {
        assert_eq!(Vni::try_from(0xff_ffff).map(Vni::number), Ok(0xff_ffff));
        assert_eq!(Vni::try_from(0x100_0000), Err(VniError(0x100_0000)));
    }
}
