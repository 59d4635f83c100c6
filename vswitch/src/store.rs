//! The runtime directory: the lock of the one daemon, and the state that a restart needs.

use std::cell::Cell;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use vswitch_control::{JournalEntry, State};

/// The directory, locked for this process.
#[derive(Debug)]
pub(crate) struct Store {
    directory: PathBuf,
    boot_id: String,
    /// Bytes of the journal when it was last written anew, and those that were added since.
    journal: Cell<(u64, u64)>,
    _lock: File,
}

/// What may be added to the journal before it is written anew, if that is more than it held before.
const JOURNAL_SLACK: u64 = 4 << 20;

impl Store {
    /// Makes the directory if need be and locks it.
    ///
    /// # Errors
    ///
    /// A sentence with the remedy; another daemon may hold it.
    pub(crate) fn open(directory: &Path) -> Result<Store, String> {
        let path = directory.display();
        fs::create_dir_all(directory).map_err(|error| {
            format!("cannot make {path}: {error}; set daemon.runtime_dir to a directory that can be written")
        })?;
        let lock = File::create(directory.join("lock"))
            .map_err(|error| format!("cannot write in {path}: {error}; run as root, or set daemon.runtime_dir"))?;
        lock.try_lock().map_err(|_| {
            format!("another vswitchd runs in {path}: stop it, or give this one another daemon.runtime_dir")
        })?;
        let boot_id = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned();
        Ok(Store { directory: directory.to_owned(), boot_id, journal: Cell::new((0, 0)), _lock: lock })
    }

    /// What the last daemon left, if it was written since boot.
    ///
    /// # Errors
    ///
    /// A sentence, if the file is there and cannot be used; the daemon then starts without it and keeps it aside.
    pub(crate) fn load(&self) -> Result<Option<State>, String> {
        let path = self.path();
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(format!("cannot read {}: {error}", path.display())),
        };
        let state: State = match serde_json::from_slice(&text) {
            Ok(state) => state,
            Err(error) => {
                let aside = path.with_extension("json.bad");
                let _ = fs::rename(&path, &aside);
                return Err(format!(
                    "{} is no state of this version ({error}): kept as {}",
                    path.display(),
                    aside.display()
                ));
            }
        };
        Ok((state.boot_id == self.boot_id).then_some(state))
    }

    /// Writes the state: whole, or not at all.
    ///
    /// # Errors
    ///
    /// Those of the file system.
    pub(crate) fn save(&self, state: &State) -> io::Result<()> {
        let new = self.directory.join("state.json.new");
        let mut file = File::create(&new)?;
        file.write_all(&serde_json::to_vec(state)?)?;
        // It is of use until the next boot only, so the disk need not have it.
        fs::rename(&new, self.path())
    }

    /// What the last daemon noted of policies and endpoints, if it did since boot. A last line that was not finished belongs to
    /// a request that was not answered.
    ///
    /// # Errors
    ///
    /// A sentence with the remedy, if it cannot be read whole: pods must not run with less than their policies.
    pub(crate) fn load_journal(&self) -> Result<Vec<JournalEntry>, String> {
        let path = self.journal_path();
        let remedy = format!("move {} away to start without the policies of the last daemon", path.display());
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(format!("cannot read {}: {error}; {remedy}", path.display())),
        };
        let mut lines = text.split_inclusive('\n');
        if lines.next().map(str::trim_end) != Some(&self.boot_id) {
            return Ok(Vec::new());
        }
        let finished = lines.enumerate().filter(|(_, line)| line.ends_with('\n'));
        finished
            .map(|(at, line)| {
                serde_json::from_str(line)
                    .map_err(|error| format!("{} line {}: {error}; {remedy}", path.display(), at + 2))
            })
            .collect()
    }

    /// Writes the journal anew: whole, or not at all.
    ///
    /// # Errors
    ///
    /// Those of the file system.
    pub(crate) fn rewrite_journal(&self, entries: &[JournalEntry]) -> io::Result<()> {
        let new = self.directory.join("policy.jsonl.new");
        let mut text = format!("{}\n", self.boot_id).into_bytes();
        lines(entries, &mut text)?;
        self.journal.set((text.len() as u64, 0));
        fs::write(&new, text)?;
        fs::rename(new, self.journal_path())
    }

    /// Adds to the journal.
    ///
    /// # Errors
    ///
    /// Those of the file system.
    pub(crate) fn append_journal(&self, entries: &[JournalEntry]) -> io::Result<()> {
        let mut text = Vec::new();
        lines(entries, &mut text)?;
        let mut file = fs::OpenOptions::new().append(true).open(self.journal_path())?;
        let before = file.metadata()?.len();
        if let Err(error) = file.write_all(&text) {
            // Half a line would take the next one with it.
            file.set_len(before)?;
            return Err(error);
        }
        let (whole, added) = self.journal.get();
        self.journal.set((whole, added + text.len() as u64));
        Ok(())
    }

    /// True if the journal says so much over and over that it should be written anew.
    pub(crate) fn is_journal_long(&self) -> bool {
        let (whole, added) = self.journal.get();
        added > JOURNAL_SLACK.max(whole)
    }

    fn journal_path(&self) -> PathBuf {
        self.directory.join("policy.jsonl")
    }

    /// The boot id that belongs into the state.
    pub(crate) fn boot_id(&self) -> &str {
        &self.boot_id
    }

    fn path(&self) -> PathBuf {
        self.directory.join("state.json")
    }
}

fn lines(entries: &[JournalEntry], text: &mut Vec<u8>) -> io::Result<()> {
    for entry in entries {
        serde_json::to_writer(&mut *text, entry)?;
        text.push(b'\n');
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_journal_is_read_as_far_as_it_was_finished_and_kept_short() {
        let directory = std::env::temp_dir().join(format!("vswitch-journal-{}", std::process::id()));
        let store = Store::open(&directory).unwrap();
        assert_eq!(store.load_journal(), Ok(Vec::new()));
        let entry = |name: &str| {
            JournalEntry::EndpointGone(vswitch_api::EndpointName { namespace: None, name: name.to_owned() })
        };
        store.rewrite_journal(&[entry("a")]).unwrap();
        store.append_journal(&[entry("b"), entry("c")]).unwrap();
        let unfinished = |text: &[u8]| {
            fs::OpenOptions::new().append(true).open(store.journal_path()).unwrap().write_all(text).unwrap();
        };
        unfinished(b"{\"endpoint");
        assert_eq!(store.load_journal(), Ok(vec![entry("a"), entry("b"), entry("c")]));
        unfinished(b"?\n");
        let wrong = store.load_journal().unwrap_err();
        assert!(wrong.contains("policy.jsonl line 5") && wrong.contains("move "), "{wrong}");
        assert!(!store.is_journal_long());
        let many: Vec<JournalEntry> = (0..200_000).map(|number| entry(&number.to_string())).collect();
        store.append_journal(&many).unwrap();
        assert!(store.is_journal_long());
        store.rewrite_journal(&[entry("a")]).unwrap();
        assert!(!store.is_journal_long());
        // Of another boot: pods and their names are others now.
        fs::write(store.journal_path(), "another\n").unwrap();
        assert_eq!(store.load_journal(), Ok(Vec::new()));
        fs::remove_dir_all(directory).unwrap();
    }

    #[test]
    fn state_of_another_boot_is_not_taken_over() {
        let directory = std::env::temp_dir().join(format!("vswitch-store-{}", std::process::id()));
        let store = Store::open(&directory).unwrap();
        assert_eq!(store.load(), Ok(None));
        let mut state = State { boot_id: store.boot_id().to_owned(), ..State::default() };
        store.save(&state).unwrap();
        assert_eq!(store.load(), Ok(Some(state.clone())));
        state.boot_id = "another".to_owned();
        store.save(&state).unwrap();
        assert_eq!(store.load(), Ok(None));
        fs::write(store.path(), "{").unwrap();
        assert!(store.load().unwrap_err().contains("kept as"));
        assert!(Store::open(&directory).unwrap_err().contains("another vswitchd"));
        fs::remove_dir_all(directory).unwrap();
    }
}
