//! The atomic steps, as scripts that the server runs: what is sent, under which digest.
//!
//! What a script decides stands in its own text, beside this file. Nothing here knows what its answer means.

use std::fmt::Write as _;

use redis::Cmd;

use crate::layout::Keys;

/// A script and the digest that the server knows it by.
pub(crate) struct Script {
    text: String,
    digest: String,
}

impl Script {
    /// `first` is run before anything is set up.
    fn new(first: &str, choices: &str, body: &str) -> Self {
        Self::of([first, choices, include_str!("scripts/common.lua"), body].concat())
    }

    fn of(text: String) -> Self {
        let digest = redis::Script::new(&text).get_hash().to_owned();
        Self { text, digest }
    }

    /// Returns the call. A server that has forgotten the script answers `NOSCRIPT`; `whole` then sends its text, which it keeps.
    pub(crate) fn call(&self, keys: &Keys, args: &[&[u8]], whole: bool) -> Cmd {
        let (verb, script) = if whole { ("EVAL", &self.text) } else { ("EVALSHA", &self.digest) };
        let size = 128 + script.len() + 3 * keys.record().len() + args.iter().map(|arg| arg.len() + 16).sum::<usize>();
        let mut call = Cmd::with_capacity(6 + args.len(), size);
        call.arg(verb).arg(script).arg(3).arg(keys.record()).arg(keys.lock()).arg(keys.queue());
        for arg in args {
            call.arg(*arg);
        }
        call
    }

    /// Returns the call for many sessions at once, each with arguments of its own, and with a key beside those of the session.
    pub(crate) fn call_all<'a, const N: usize>(
        &self,
        members: impl Iterator<Item = (&'a Keys, &'a str, [&'a [u8]; N])> + Clone,
        whole: bool,
    ) -> Cmd {
        let (verb, script) = if whole { ("EVAL", &self.text) } else { ("EVALSHA", &self.digest) };
        let length = |(keys, key, args): (&Keys, &str, [&[u8]; N])| {
            3 * keys.queue().len() + key.len() + args.iter().map(|arg| arg.len()).sum::<usize>()
        };
        let count = members.clone().count();
        let size = 32 + script.len() + members.clone().map(length).sum::<usize>();
        let mut call = Cmd::with_capacity(3 + count * (4 + N), size);
        call.arg(verb).arg(script).arg(4 * count);
        for (keys, key, _) in members.clone() {
            call.arg(keys.record()).arg(keys.lock()).arg(keys.queue()).arg(key);
        }
        for arg in members.flat_map(|(_, _, args)| args) {
            call.arg(arg);
        }
        call
    }

    /// Returns the command that gives the script to a server.
    fn load(&self) -> Cmd {
        let mut load = Cmd::with_capacity(3, 32 + self.text.len());
        load.arg("SCRIPT").arg("LOAD").arg(&self.text);
        load
    }
}

/// All scripts of one handler.
pub(crate) struct Scripts {
    pub(crate) enter: Script,
    pub(crate) save: Script,
    pub(crate) save_all: Script,
    pub(crate) destroy: Script,
    pub(crate) release: Script,
    pub(crate) renew: Script,
}

impl Scripts {
    /// `skip_deaf`: whether a waiter whom a message did not reach may be passed over; in a Cluster the count of listeners says
    /// nothing. `strict`: whether a lease that has ended no longer writes.
    pub(crate) fn new(skip_deaf: bool, strict: bool) -> Self {
        let mut choices = String::new();
        let _ = writeln!(choices, "local SKIP_DEAF, STRICT = {skip_deaf}, {strict}");
        let one = [
            "local function one(KEYS, ARGV)\n",
            &choices,
            include_str!("scripts/common.lua"),
            include_str!("scripts/save.lua"),
            "end\n",
        ];
        Self {
            save_all: Script::of(one.concat() + include_str!("scripts/save_all.lua")),
            enter: Script::new("", &choices, include_str!("scripts/enter.lua")),
            save: Script::new(include_str!("scripts/save_fast.lua"), &choices, include_str!("scripts/save.lua")),
            destroy: Script::new("", &choices, include_str!("scripts/destroy.lua")),
            release: Script::new(include_str!("scripts/release_fast.lua"), &choices, include_str!("scripts/release.lua")),
            renew: Script::new("", &choices, include_str!("scripts/renew.lua")),
        }
    }

    /// Returns the commands that give all scripts to a server.
    pub(crate) fn load(&self) -> impl Iterator<Item = Cmd> {
        let Self { enter, save, save_all, destroy, release, renew } = self;
        [enter, save, save_all, destroy, release, renew].into_iter().map(Script::load)
    }
}
