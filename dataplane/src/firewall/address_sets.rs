//! Remote groups and named address sets: which sets an address is in.
//!
//! One [`AddressBook`] on the control side knows all sets. [`AddressBook::snapshot`] makes an [`AddressIndex`], a read-only
//! structure that PMD threads share and that is replaced as a whole when memberships change. Compiled policies refer to sets by
//! [`SetId`] only, so a VM that joins or leaves a group costs one new index, however many ports name the group: none of them
//! is compiled again.
use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;

use serde::Serialize;

use super::cidr::Cidr;
use super::policy::{MAX_ADDRESSES_PER_SET, PolicyDocument};
use super::prefix_index::{Address, NO_PREFIX, PrefixIndex, Steps};

/// Number of a set. Given once per name and never again to another, so that a compiled policy and an index of different age
/// can meet without confusion.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SetId(pub(crate) u32);

/// What a set is called.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum SetKey {
    /// The addresses of a security group's members.
    Group(String),
    /// A named address set.
    AddressSet(String),
}

impl fmt::Display for SetKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Group(name) => write!(f, "group {name}"),
            Self::AddressSet(name) => write!(f, "set {name}"),
        }
    }
}

/// A set would have more than [`MAX_ADDRESSES_PER_SET`] prefixes.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0} would have more than {MAX_ADDRESSES_PER_SET} addresses")]
pub struct TooManyAddresses(pub SetKey);

/// Members of one family: per prefix, the sets it is in and how often (two members of a group may share an address).
type Members<A> = BTreeMap<(A, u8), BTreeMap<SetId, u32>>;

/// All sets, on the control side.
#[derive(Clone, Debug, Default)]
pub struct AddressBook {
    ids: BTreeMap<SetKey, SetId>,
    /// Members of each set, by its number, with their counts.
    sets: Vec<BTreeMap<Cidr, u32>>,
    v4: Members<u32>,
    v6: Members<u128>,
    version: u64,
}

impl AddressBook {
    /// No sets.
    pub fn new() -> Self {
        Self::default()
    }

    /// The number of the set of this name; a new one, of an empty set, when it has none yet.
    pub fn intern(&mut self, key: &SetKey) -> SetId {
        if let Some(id) = self.ids.get(key) {
            return *id;
        }
        let id = SetId(self.sets.len() as u32);
        self.ids.insert(key.clone(), id);
        self.sets.push(BTreeMap::new());
        id
    }

    /// Sets the members of all named address sets to what `document` says; sets that it does not have become empty.
    ///
    /// # Errors
    /// [`TooManyAddresses`]; the sets before are changed already, so [`PolicyDocument::validate`] should come first.
    pub fn load_document(&mut self, document: &PolicyDocument) -> Result<(), TooManyAddresses> {
        let gone = self.ids.keys().filter(|key| match key {
            SetKey::AddressSet(name) => !document.address_sets.contains_key(name),
            SetKey::Group(_) => false,
        });
        for key in gone.cloned().collect::<Vec<_>>() {
            self.set_members(&key, &[])?;
        }
        for (name, set) in &document.address_sets {
            self.set_members(&SetKey::AddressSet(name.clone()), &set.addresses)?;
        }
        Ok(())
    }

    /// Makes `members` the set's members. An address listed several times counts several times for [`Self::remove`].
    ///
    /// # Errors
    /// [`TooManyAddresses`]; nothing is changed then.
    pub fn set_members(&mut self, key: &SetKey, members: &[Cidr]) -> Result<(), TooManyAddresses> {
        let mut new: BTreeMap<Cidr, u32> = BTreeMap::new();
        for cidr in members {
            *new.entry(*cidr).or_default() += 1;
        }
        if new.len() > MAX_ADDRESSES_PER_SET {
            return Err(TooManyAddresses(key.clone()));
        }
        let id = self.intern(key);
        let Some(slot) = self.sets.get_mut(id.0 as usize) else { return Ok(()) };
        if *slot == new {
            return Ok(());
        }
        let old = std::mem::replace(slot, new.clone());
        for cidr in old.keys().filter(|cidr| !new.contains_key(cidr)) {
            self.put(*cidr, id, 0);
        }
        for (cidr, count) in &new {
            self.put(*cidr, id, *count);
        }
        self.version += 1;
        Ok(())
    }

    /// Adds one member's address to a set. True when it was not in it.
    ///
    /// # Errors
    /// [`TooManyAddresses`]; nothing is changed then.
    pub fn add(&mut self, key: &SetKey, cidr: Cidr) -> Result<bool, TooManyAddresses> {
        let id = self.intern(key);
        let Some(set) = self.sets.get_mut(id.0 as usize) else { return Ok(false) };
        if !set.contains_key(&cidr) && set.len() >= MAX_ADDRESSES_PER_SET {
            return Err(TooManyAddresses(key.clone()));
        }
        let count = set.entry(cidr).or_default();
        *count = count.saturating_add(1);
        let count = *count;
        self.put(cidr, id, count);
        if count == 1 {
            self.version += 1;
        }
        Ok(count == 1)
    }

    /// Takes one member's address out of a set. True when no other member has it, so that it left the set.
    pub fn remove(&mut self, key: &SetKey, cidr: Cidr) -> bool {
        let Some(&id) = self.ids.get(key) else { return false };
        let Some(set) = self.sets.get_mut(id.0 as usize) else { return false };
        let Some(count) = set.get_mut(&cidr) else { return false };
        *count -= 1;
        let left = *count;
        if left == 0 {
            set.remove(&cidr);
            self.version += 1;
        }
        self.put(cidr, id, left);
        left == 0
    }

    /// Records how often `cidr` is in set `id`.
    fn put(&mut self, cidr: Cidr, id: SetId, count: u32) {
        match cidr {
            Cidr::V4(key, len) => put(&mut self.v4, (key, len), id, count),
            Cidr::V6(key, len) => put(&mut self.v6, (key, len), id, count),
        }
    }

    /// Prefixes in a set, without duplicates.
    pub fn members(&self, key: &SetKey) -> impl Iterator<Item = Cidr> + '_ {
        self.ids.get(key).and_then(|id| self.sets.get(id.0 as usize)).into_iter().flat_map(|set| set.keys().copied())
    }

    /// The name of a set.
    pub fn key(&self, id: SetId) -> Option<&SetKey> {
        self.ids.iter().find(|(_, i)| **i == id).map(|(key, _)| key)
    }

    /// Counts the changes so far.
    pub fn version(&self) -> u64 {
        self.version
    }

    /// The sets as they are now, for the packet path. `seed`: any random number, against chosen collisions.
    pub fn snapshot(&self, seed: u64) -> AddressIndex {
        AddressIndex {
            v4: FamilyIndex::build(&self.v4, seed),
            v6: FamilyIndex::build(&self.v6, seed),
            version: self.version,
        }
    }
}

fn put<A: Address>(members: &mut Members<A>, prefix: (A, u8), id: SetId, count: u32) {
    let sets = members.entry(prefix).or_default();
    if count > 0 {
        sets.insert(id, count);
        return;
    }
    sets.remove(&id);
    if sets.is_empty() {
        members.remove(&prefix);
    }
}

/// One prefix that is a member of sets.
#[derive(Clone, Copy, Debug)]
struct Member {
    /// The next shorter prefix, or [`NO_PREFIX`].
    parent: u32,
    /// Its sets: where in [`FamilyIndex::sets`], and how many.
    offset: u32,
    len: u32,
}

#[derive(Clone, Debug)]
struct FamilyIndex<A> {
    index: PrefixIndex<A>,
    members: Box<[Member]>,
    /// Set numbers, ascending for each member.
    sets: Box<[SetId]>,
}

impl<A: Address> FamilyIndex<A> {
    fn build(members: &Members<A>, seed: u64) -> Self {
        let prefixes: Vec<(A, u8)> = members.keys().copied().collect();
        let (index, parents) = PrefixIndex::build(&prefixes, seed);
        let mut sets = Vec::new();
        let members = members.values().zip(parents).map(|(ids, parent)| {
            let offset = sets.len() as u32;
            sets.extend(ids.keys());
            Member { parent, offset, len: ids.len() as u32 }
        });
        let members = members.collect();
        Self { index, members, sets: sets.into() }
    }

    #[inline]
    fn lookup(&self, address: A, steps: &mut impl Steps) -> SetLists<'_> {
        SetLists { at: self.index.lookup(address, steps), members: &self.members, sets: &self.sets }
    }

    fn memory_bytes(&self) -> usize {
        self.index.memory_bytes() + size_of_val(&*self.members) + size_of_val(&*self.sets)
    }
}

/// Which sets an address is in, at one moment. Immutable; replaced as a whole.
#[derive(Clone, Debug)]
pub struct AddressIndex {
    v4: FamilyIndex<u32>,
    v6: FamilyIndex<u128>,
    version: u64,
}

impl Default for AddressIndex {
    /// No sets.
    fn default() -> Self {
        AddressBook::new().snapshot(0)
    }
}

impl AddressIndex {
    /// The [`AddressBook::version`] that it shows.
    pub fn version(&self) -> u64 {
        self.version
    }

    /// The sets that contain `address`, list by list: one for each prefix that contains it, longest first. A set may be in
    /// several of them.
    #[inline]
    pub(crate) fn lists(&self, address: IpAddr, steps: &mut impl Steps) -> SetLists<'_> {
        match address {
            IpAddr::V4(a) => self.v4.lookup(a.to_bits(), steps),
            IpAddr::V6(a) => self.v6.lookup(a.to_bits(), steps),
        }
    }

    /// The sets that contain `address`, ascending.
    pub fn sets_of(&self, address: IpAddr) -> Vec<SetId> {
        let mut all: Vec<SetId> = self.lists(address, &mut ()).flatten().copied().collect();
        all.sort_unstable();
        all.dedup();
        all
    }

    /// `address` is in the set.
    pub fn contains(&self, set: SetId, address: IpAddr) -> bool {
        self.lists(address, &mut ()).any(|list| list.binary_search(&set).is_ok())
    }

    /// Bytes of memory.
    pub fn memory_bytes(&self) -> usize {
        self.v4.memory_bytes() + self.v6.memory_bytes()
    }
}

/// Iterator over the lists of sets of one address.
#[derive(Clone, Debug)]
pub(crate) struct SetLists<'a> {
    at: u32,
    members: &'a [Member],
    sets: &'a [SetId],
}

impl<'a> Iterator for SetLists<'a> {
    type Item = &'a [SetId];

    #[inline]
    fn next(&mut self) -> Option<&'a [SetId]> {
        if self.at == NO_PREFIX {
            return None;
        }
        let member = self.members.get(self.at as usize)?;
        self.at = member.parent;
        self.sets.get(member.offset as usize..(member.offset + member.len) as usize)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(name: &str) -> SetKey {
        SetKey::Group(name.into())
    }

    fn cidr(text: &str) -> Cidr {
        text.parse().unwrap()
    }

    fn names(book: &AddressBook, address: &str) -> Vec<String> {
        let index = book.snapshot(7);
        index.sets_of(address.parse().unwrap()).iter().map(|id| book.key(*id).unwrap().to_string()).collect()
    }

    #[test]
    fn an_address_is_in_all_sets_whose_prefixes_contain_it() {
        let mut book = AddressBook::new();
        book.set_members(&group("web"), &[cidr("10.0.0.5"), cidr("2001:db8::5")]).unwrap();
        book.set_members(&SetKey::AddressSet("office".into()), &[cidr("10.0.0.0/8"), cidr("10.0.0.0/24")]).unwrap();
        assert_eq!(names(&book, "10.0.0.5"), ["group web", "set office"]);
        assert_eq!(names(&book, "10.9.0.5"), ["set office"]);
        assert_eq!(names(&book, "2001:db8::5"), ["group web"]);
        assert!(names(&book, "11.0.0.0").is_empty());
    }

    #[test]
    fn a_shared_address_leaves_with_its_last_owner() {
        let mut book = AddressBook::new();
        let before = book.version();
        assert!(book.add(&group("web"), cidr("10.0.0.5")).unwrap());
        assert!(!book.add(&group("web"), cidr("10.0.0.5")).unwrap());
        assert!(!book.remove(&group("web"), cidr("10.0.0.5")));
        assert_eq!(names(&book, "10.0.0.5"), ["group web"]);
        assert!(book.remove(&group("web"), cidr("10.0.0.5")));
        assert!(!book.remove(&group("web"), cidr("10.0.0.5")));
        assert!(!book.remove(&group("db"), cidr("10.0.0.5")));
        assert!(names(&book, "10.0.0.5").is_empty());
        assert_eq!(book.version(), before + 2);
    }

    #[test]
    fn numbers_stay_with_their_names() {
        let mut book = AddressBook::new();
        let (a, b) = (book.intern(&group("a")), book.intern(&group("b")));
        book.set_members(&group("a"), &[cidr("10.0.0.1")]).unwrap();
        book.set_members(&group("a"), &[]).unwrap();
        assert_eq!((book.intern(&group("a")), book.intern(&group("b"))), (a, b));
        assert_ne!(book.intern(&SetKey::AddressSet("a".into())), a);
    }

    #[test]
    fn a_document_replaces_the_named_sets_and_leaves_groups_alone() {
        let mut book = AddressBook::new();
        book.add(&group("web"), cidr("10.0.0.5")).unwrap();
        let document =
            |sets: &str| serde_json::from_str::<PolicyDocument>(&format!(r#"{{"address_sets":{sets}}}"#)).unwrap();
        book.load_document(&document(r#"{"x":{"addresses":["10.0.0.5"]},"y":{"addresses":["10.0.0.0/24"]}}"#)).unwrap();
        assert_eq!(names(&book, "10.0.0.5"), ["group web", "set x", "set y"]);
        let version = book.version();
        book.load_document(&document(r#"{"x":{"addresses":["10.0.0.5"]},"y":{"addresses":["10.0.0.0/24"]}}"#)).unwrap();
        assert_eq!(book.version(), version, "nothing changed");
        book.load_document(&document(r#"{"y":{"addresses":["10.0.0.0/24"]}}"#)).unwrap();
        assert_eq!(names(&book, "10.0.0.5"), ["group web", "set y"]);
    }
}
