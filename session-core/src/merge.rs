//! Laying the changes of one request over the newest state: per key, by encoded bytes.
//!
//! Nothing here knows about stores or locks.

use std::sync::Arc;

use bytes::Bytes;

use crate::error::{Error, ErrorKind, Result};
use crate::values::Values;

/// A change of one key that can be done again on a newer value.
pub(crate) type Redo = Arc<dyn Fn(Option<&[u8]>) -> Result<Bytes> + Send + Sync>;

/// Lays what changed from `base` to `ours` over `theirs`; absent is a value like any other. `redo` holds the keys whose every
/// change was an `update_key`, in order: those are done again on their value instead of conflicting.
///
/// A key that both sides changed to different values is a [`Conflict`](ErrorKind::Conflict) that names it. Keys that were only
/// read are not compared.
pub(crate) fn lay_over(base: &Values, ours: &Values, theirs: &Values, redo: &[(String, Vec<Redo>)]) -> Result<Values> {
    let mut merged = theirs.clone();
    let mut conflicts = Vec::new();
    let mut keys: Vec<&str> = base.keys().chain(ours.keys()).collect();
    keys.sort_unstable();
    keys.dedup();
    for key in keys {
        let (was, is, now) = (base.get(key), ours.get(key), theirs.get(key));
        let again = redo.iter().find(|(redo, _)| redo == key).map(|(_, changes)| changes);
        let result = match again {
            Some(changes) if now != was => {
                let mut value = now.map(Bytes::copy_from_slice);
                for change in changes {
                    value = Some(change(value.as_deref())?);
                }
                value
            }
            _ if was == is || is == now => continue,
            _ if now != was => {
                conflicts.push(key.to_string());
                continue;
            }
            _ => is.map(Bytes::copy_from_slice),
        };
        match result {
            Some(value) => merged.insert(key, value),
            None => drop(merged.remove(key)),
        }
    }
    if conflicts.is_empty() {
        return Ok(merged);
    }
    let message = "another request changed the same keys to something else";
    Err(Error::new(ErrorKind::Conflict, "merge", message).with_keys(conflicts))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(text: &str) -> Values {
        let pairs = text.split_whitespace().map(|pair| pair.split_once('=').expect("key=value"));
        pairs.map(|(key, value)| (key, value.as_bytes().to_vec())).collect()
    }

    #[track_caller]
    fn check(base: &str, ours: &str, theirs: &str, merged: &str) {
        assert_eq!(lay_over(&values(base), &values(ours), &values(theirs), &[]).unwrap(), values(merged));
    }

    #[test]
    fn changes_of_different_keys_are_both_kept() {
        check("a=1 b=1", "a=2 b=1", "a=1 b=2", "a=2 b=2");
        check("a=1", "a=1 c=1", "a=1 b=1", "a=1 b=1 c=1");
        check("a=1 b=1", "b=1", "a=1 b=1 c=1", "b=1 c=1");
        check("a=1 b=1", "", "a=1 b=1 c=1", "c=1");
    }

    #[test]
    fn the_same_change_on_both_sides_is_no_conflict() {
        check("a=1", "a=2", "a=2", "a=2");
        check("a=1", "", "b=1", "b=1");
    }

    #[test]
    fn a_key_that_was_only_read_is_theirs() {
        check("a=1 b=1", "a=1 b=2", "a=9 b=1", "a=9 b=2");
    }

    #[test]
    fn different_changes_of_one_key_are_a_conflict_that_names_it() {
        for (ours, theirs) in [("a=2", "a=3"), ("", "a=3"), ("a=2", "")] {
            let error = lay_over(&values("a=1"), &values(ours), &values(theirs), &[]).unwrap_err();
            assert_eq!((error.kind(), error.keys()), (ErrorKind::Conflict, &["a".to_string()][..]));
        }
        assert!(lay_over(&values(""), &values("a=1"), &values("a=2"), &[]).is_err());
    }

    #[test]
    fn an_update_is_done_again_on_the_newest_value() {
        let add: Redo = Arc::new(|value| {
            let number: u32 = value.map_or(0, |v| std::str::from_utf8(v).unwrap().parse().unwrap());
            Ok(Bytes::from((number + 1).to_string()))
        });
        let redo = [("n".to_string(), vec![add.clone(), add])];
        let merged = lay_over(&values("n=1"), &values("n=3"), &values("n=7 m=1"), &redo).unwrap();
        assert_eq!(merged, values("n=9 m=1"));
        let unchanged = lay_over(&values("n=1"), &values("n=3"), &values("n=1 m=1"), &redo).unwrap();
        assert_eq!(unchanged, values("n=3 m=1"));
    }
}
