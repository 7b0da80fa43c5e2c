//! Asking, for one session: commands and scripts, and when they are sent once more.
//!
//! It knows keys and scripts; which server has them, what may be written, and what an answer means for an opening, it does not.

use std::fmt;
use std::sync::{Arc, Weak};
use std::time::Duration;

use redis::{Cmd, Pipeline, ServerErrorKind, Value};
use session_core::leased::{Found, Want};
use session_core::{Result, SessionId, WriteId};

use crate::acquire::{Crowds, Places};
use crate::answers::{answers, found, look_at, only};
use crate::batches::{Batches, Change, Entered, enter, look};
use crate::config::RedisConfig;
use crate::layout::{Keys, TokenText, channel, lock_value};
use crate::link::{Failure, error_kind};
use crate::scripts::{Script, Scripts};
use crate::servers::Servers;
use crate::waiters::{PassOn, Subscribe, Waiters};

pub(crate) struct Store {
    pub(crate) servers: Arc<Servers>,
    pub(crate) config: RedisConfig,
    pub(crate) scripts: Arc<Scripts>,
    /// Where many sessions are on one server, and no change has to wait for replicas, which has batches of its own.
    pub(crate) batches: Option<Batches>,
    pub(crate) waiters: Waiters,
    pub(crate) places: Places,
    pub(crate) crowds: Crowds,
}

impl Store {
    pub(crate) fn new(servers: Servers, config: RedisConfig) -> Result<Arc<Self>> {
        let nonce: String = WriteId::random()?.to_bytes()[..4].iter().map(|byte| format!("{byte:02x}")).collect();
        let cluster = matches!(servers, Servers::Cluster(_));
        let servers = Arc::new(servers);
        let scripts = Arc::new(Scripts::new(!cluster, config.strict_expiry));
        let together = !cluster && config.wait_replicas == 0;
        let batches = together.then(|| Batches::new(servers.clone(), scripts.clone()));
        Ok(Arc::new_cyclic(|this: &Weak<Self>| {
            let source = servers.clone();
            let subscribe: Subscribe = Arc::new(move || {
                let source = source.clone();
                Box::pin(async move { source.client().await?.get_async_pubsub().await })
            });
            let this = this.clone();
            let pass_on: PassOn = Arc::new(move |token, record| {
                if let Some(store) = this.upgrade() {
                    store.pass_on(token, record);
                }
            });
            let channel = channel(&config.prefix, &nonce);
            Self {
                waiters: Waiters::new(channel, subscribe, pass_on),
                scripts,
                batches,
                places: Places::default(),
                crowds: Crowds::default(),
                servers,
                config,
            }
        }))
    }

    /// Asks the server for an answer of any kind, and gives it the scripts, so that no request has to. Whether waiters may be told is
    /// asked too: a script that may not tell them would not say so, and leave them to their sleep.
    pub(crate) async fn greet(&self) -> Result<(), Failure> {
        let mut greeting = Pipeline::with_capacity(9);
        greeting.cmd("PING").cmd("PUBLISH").arg(channel(&self.config.prefix, "")).arg("");
        for load in self.scripts.load() {
            greeting.add_command(load);
        }
        // Whoever may not load scripts sends each of them whole with its first call.
        let answers = self.servers.greet(&greeting).await?;
        let refusal = answers.iter().take(2).find_map(|answer| match answer {
            Value::ServerError(error) => Some(Failure::refused(error)),
            _ => None,
        });
        refusal.map_or(Ok(()), Err)
    }

    pub(crate) fn keys(&self, id: &SessionId) -> Keys {
        Keys::new(&self.config.prefix, id)
    }

    /// Returns the value of a lock that this handler takes now.
    pub(crate) fn lock_value(&self, token: &TokenText, lease: Duration) -> Arc<[u8]> {
        lock_value(token, lease, self.waiters.channel())
    }

    /// Sends commands of one session in one flight. What fails in passing is tried once more, so they must bear that.
    pub(crate) async fn ask(&self, keys: &Keys, commands: &Pipeline) -> Result<Vec<Value>, Failure> {
        self.ask_twice(keys, commands).await.map(|(answers, _)| answers)
    }

    /// The same, and says whether the answers are those to a repeat.
    pub(crate) async fn ask_twice(&self, keys: &Keys, commands: &Pipeline) -> Result<(Vec<Value>, bool), Failure> {
        let sent = match self.servers.ask(keys, commands).await {
            Ok(answers) if !answers.iter().any(|answer| error_kind(answer) == Some(ServerErrorKind::ReadOnly)) => {
                return Ok((answers, false));
            }
            Ok(_) => false,
            Err(failure) if !failure.passing => return Err(failure),
            Err(failure) => failure.sent,
        };
        let repeated = self.servers.ask(keys, commands).await;
        repeated.map(|answers| (answers, true)).map_err(|mut failure| {
            failure.sent |= sent;
            failure
        })
    }

    /// Runs a script that may be run twice.
    pub(crate) async fn run(&self, keys: &Keys, script: &Script, args: &[&[u8]]) -> Result<Value, Failure> {
        for whole in [false, true] {
            let mut commands = Pipeline::with_capacity(1);
            commands.add_command(script.call(keys, args, whole));
            match only(self.ask(keys, &commands).await?)? {
                answer if error_kind(&answer) == Some(ServerErrorKind::NoScript) => {}
                Value::ServerError(error) => return Err(Failure::refused(&error)),
                answer => return Ok(answer),
            }
        }
        Err(Failure::unexpected("the server does not keep a script that it was just given"))
    }

    /// Runs a script that changes a record, once and once more if that is not answered; says whether the first may have been
    /// carried out although it was not answered. With `wait_replicas` the answer counts only once they have it.
    pub(crate) async fn run_once(&self, keys: &Keys, script: &Script, args: &[&[u8]]) -> (Result<Value, Failure>, bool) {
        let mut sent = false;
        let mut whole = false;
        let mut tries = 0;
        loop {
            let outcome = self.change_once(keys, script.call(keys, args, whole)).await;
            let failure = match outcome {
                Ok(answer) if error_kind(&answer) == Some(ServerErrorKind::NoScript) && !whole => {
                    whole = true;
                    continue;
                }
                Ok(Value::ServerError(error)) => Failure::refused(&error),
                Ok(answer) => return (Ok(answer), sent),
                Err(failure) => failure,
            };
            sent |= failure.sent;
            tries += 1;
            if tries == 2 || !failure.passing {
                return (Err(failure), sent);
            }
        }
    }

    async fn change_once(&self, keys: &Keys, call: Cmd) -> Result<Value, Failure> {
        if self.config.wait_replicas > 0 {
            return self.servers.ask_with_replicas(keys, call).await;
        }
        let mut commands = Pipeline::with_capacity(1);
        commands.add_command(call);
        only(self.servers.ask(keys, &commands).await?)
    }

    /// Sends one command each for many sessions, in one flight to each server.
    pub(crate) async fn ask_many(&self, commands: Vec<(u16, Cmd)>) -> Vec<Result<Value, Failure>> {
        self.servers.ask_many(commands).await
    }

    /// Takes the lock `token` if it is free and nobody waits for it, and reads in the same flight; says whether that was sent before
    /// without an answer.
    pub(crate) async fn enter(
        &self,
        keys: &Keys,
        token: &TokenText,
        value: &Arc<[u8]>,
        lease: i64,
        want: Want,
    ) -> (Result<Entered, Failure>, bool) {
        if let Some(batches) = &self.batches {
            // On the heap, as all below it: an open is a future of less than 1 KiB then, which allocators have at hand on each thread.
            return Box::pin(batches.enter(keys, token, value, lease, want)).await;
        }
        let mut commands = Pipeline::with_capacity(4);
        enter(&mut commands, keys, value, lease, want != Want::Lock);
        match Box::pin(self.ask_twice(keys, &commands)).await {
            Ok((answers, repeated)) => (Entered::parse(&mut answers.into_iter(), want != Want::Lock), repeated),
            Err(failure) => (Err(failure), false),
        }
    }

    /// Has a change judged by the script of saves; says whether an earlier copy may have been carried out without an answer.
    pub(crate) async fn judge(&self, keys: &Keys, change: Change) -> (Result<Value, Failure>, bool) {
        // On the heap, both: a save is then as small as an open.
        match &self.batches {
            Some(batches) => Box::pin(batches.change(keys, change)).await,
            None => {
                let ttl = change.ttl.to_string();
                Box::pin(self.run_once(keys, &self.scripts.save, &change.args(&ttl))).await
            }
        }
    }

    /// Reads a record as it is now.
    pub(crate) async fn read_record(&self, keys: &Keys) -> Result<Found, Failure> {
        if let Some(batches) = &self.batches {
            let (body, left) = batches.look(keys).await?;
            return found(body, left);
        }
        let mut commands = Pipeline::with_capacity(2);
        look(&mut commands, keys);
        let [body, left] = answers(self.ask(keys, &commands).await?)?;
        let (body, left) = look_at(body, &left)?;
        found(body, left)
    }
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Store")
            .field("config", &self.config)
            .field("servers", &self.servers)
            .field("waiters", &self.waiters)
            .finish_non_exhaustive()
    }
}

pub(crate) fn millis(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX).max(1)
}

/// Makes a command in as much room as it takes.
pub(crate) fn command(words: &[&[u8]]) -> Cmd {
    let mut command = Cmd::with_capacity(words.len(), words.iter().map(|word| word.len()).sum());
    for word in words {
        command.arg(*word);
    }
    command
}
