//! Big tables in huge pages: a random lookup then misses the cache, and not the translation of its address too.

use crate::sys;

/// `count` copies of `value`, in huge pages where the kernel has them to give (`transparent_hugepage/enabled` is "madvise"
/// or "always").
pub fn filled<T: Clone>(value: T, count: usize) -> Box<[T]> {
    let mut table = Vec::with_capacity(count);
    // Before the first page is written to, for that decides what kind it is.
    sys::advise_huge(table.spare_capacity_mut());
    table.resize(count, value);
    table.into_boxed_slice()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_of_any_size_are_full() {
        for count in [0, 1, 1000, 3_000_000] {
            let table = filled(7_u64, count);
            assert_eq!(table.len(), count);
            assert!(table.iter().all(|&value| value == 7));
        }
    }
}
