//! Values by number: the compiler's things refer to each other by these.

use std::collections::HashMap;

/// Values by number; numbers of values that are gone are given out again.
#[derive(Debug)]
pub(super) struct Slab<T> {
    items: Vec<Option<T>>,
    free: Vec<u32>,
}

impl<T> Default for Slab<T> {
    fn default() -> Self {
        Slab { items: Vec::new(), free: Vec::new() }
    }
}

impl<T> Slab<T> {
    pub(super) fn insert(&mut self, item: T) -> u32 {
        match self.free.pop() {
            Some(number) => {
                self.items[number as usize] = Some(item);
                number
            }
            None => {
                self.items.push(Some(item));
                self.items.len() as u32 - 1
            }
        }
    }

    pub(super) fn remove(&mut self, number: u32) -> Option<T> {
        let item = self.items.get_mut(number as usize)?.take()?;
        self.free.push(number);
        Some(item)
    }

    pub(super) fn get(&self, number: u32) -> Option<&T> {
        self.items.get(number as usize)?.as_ref()
    }

    pub(super) fn get_mut(&mut self, number: u32) -> Option<&mut T> {
        self.items.get_mut(number as usize)?.as_mut()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (u32, &T)> {
        self.items.iter().enumerate().filter_map(|(at, item)| Some((at as u32, item.as_ref()?)))
    }

    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = (u32, &mut T)> {
        self.items.iter_mut().enumerate().filter_map(|(at, item)| Some((at as u32, item.as_mut()?)))
    }

    pub(super) fn keys(&self) -> impl Iterator<Item = u32> {
        self.iter().map(|(number, _)| number)
    }

    pub(super) fn len(&self) -> usize {
        self.items.len() - self.free.len()
    }
}

/// Values that are shared, by number.
#[derive(Debug)]
pub(super) struct Interner<T> {
    items: Slab<(T, usize)>,
    numbers: HashMap<T, u32>,
}

impl<T> Default for Interner<T> {
    fn default() -> Self {
        Interner { items: Slab::default(), numbers: HashMap::new() }
    }
}

impl<T: Clone + Eq + std::hash::Hash> Interner<T> {
    /// One more user; the number, if the value is new.
    pub(super) fn acquire(&mut self, value: &T) -> Option<u32> {
        if let Some(&number) = self.numbers.get(value) {
            if let Some((_, users)) = self.items.get_mut(number) {
                *users += 1;
            }
            return None;
        }
        let number = self.items.insert((value.clone(), 1));
        self.numbers.insert(value.clone(), number);
        Some(number)
    }

    /// One user less; the number, if it was the last.
    pub(super) fn release(&mut self, value: &T) -> Option<u32> {
        let number = *self.numbers.get(value)?;
        let (_, users) = self.items.get_mut(number)?;
        *users -= 1;
        if *users > 0 {
            return None;
        }
        self.items.remove(number);
        self.numbers.remove(value);
        Some(number)
    }

    pub(super) fn number(&self, value: &T) -> Option<u32> {
        self.numbers.get(value).copied()
    }

    pub(super) fn get(&self, number: u32) -> Option<&T> {
        self.items.get(number).map(|(value, _)| value)
    }
}
