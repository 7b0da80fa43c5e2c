//! PostgreSQL: each step is one statement that commits by itself, so no connection is held while a session is open.
//!
//! What takes or gives back a lock commits without waiting for the disk; what writes a record waits. A statement sees a row as it
//! is when it gets it, which needs READ COMMITTED: our own connections are set to it, on those of an application another level
//! only makes statements fail that are then repeated. How waiters are woken stands in `postgres/listener.rs`.

mod batch;
mod errors;
mod listener;
mod server;
mod statements;
#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests;
mod transaction;

use std::fmt;
use std::slice;
use std::sync::Arc;

use async_trait::async_trait;
use session_core::leased::{Basis, Found, Renewed, Then, Verdict, Want};
use session_core::{ErrorKind, LeaseToken, Record, Ttl, WriteId};
use sqlx::postgres::{PgConnectOptions, PgConnection, PgRow, PgSslMode};
use sqlx::{AssertSqlSafe, Executor, PgPool, SqlSafeStr, SqlStr};

use crate::config::{SqlAddress, SqlConfig, SqlLockMode};
use crate::connections::Connections;
use crate::database::{
    Action, Alter, Busy, Database, Enter, Entered, Failure, Listed, Locked, Owner, Remove, Renew, Waiter, holder, millis,
    span,
};
use crate::pieces::{Finds, in_pieces};
use crate::plain::Statement;
use crate::transaction::Transactions;
use listener::{Leave, Listener};
use server::{Parameters, Server, bytes, field, list};
use statements::{Statements, VERSION, schema};

/// How often a statement is asked anew whose row somebody changed while it ran.
const TURNS: usize = 8;

/// For our own connections: the level of isolation that the statements are made for, and plans that are made once and suit a
/// table of any size, as each row is looked for by its key.
///
/// And pages of a table that is larger than the memory of the server go to the disk while it works, not all at the end of a checkpoint:
/// the kernel wrote gigabytes then, and whoever committed beside it waited 70 to 350 ms. It is how checkpoints themselves do it.
const SETUP: &str = "SET default_transaction_isolation = 'read committed'; SET plan_cache_mode = 'force_generic_plan'; \
    SET enable_seqscan = off; SET enable_hashjoin = off; SET enable_mergejoin = off; SET enable_bitmapscan = off; \
    SET enable_indexonlyscan = off; \
    SET max_parallel_workers_per_gather = 0; SET jit = off; SET backend_flush_after = '256kB'";

pub(crate) struct Postgres {
    server: Arc<Server>,
    listener: Listener,
    statements: Statements,
    owner: Owner,
    /// Quoted.
    table: String,
    index: String,
    holds: String,
    /// Expired records, and what is left of others, to be freed.
    finds: [Finds; 2],
    strict: bool,
}

/// Connects to the server at `address`.
pub(crate) async fn connect(address: &SqlAddress, config: &SqlConfig, owner: Owner) -> Result<Arc<dyn Database>, Failure> {
    let mut options = PgConnectOptions::new_without_pgpass()
        .host(&address.host)
        .port(if address.port == 0 { 5432 } else { address.port })
        .database(&address.database)
        .ssl_mode(if address.tls { PgSslMode::VerifyFull } else { PgSslMode::Disable })
        .application_name("sessionkit")
        // A parameter that no pooler knows.
        .extra_float_digits(None);
    if let Some(ca) = &address.ca {
        options = options.ssl_root_cert(ca);
    }
    if let Some(socket) = &address.socket {
        options = options.socket(socket);
    }
    if let Some(user) = &address.user {
        options = options.username(user);
    }
    if let Some(password) = &address.password {
        options = options.password(password);
    }
    let options = sqlx::ConnectOptions::disable_statement_logging(options);
    let connections = Connections::new(options.clone(), set_up, config.connections(), config.connect_timeout);
    Ok(Arc::new(Postgres::new(connections, options, config, owner)))
}

/// Takes the connections of an application.
pub(crate) fn over(pool: PgPool, config: &SqlConfig, owner: Owner) -> Arc<dyn Database> {
    let options = (*pool.connect_options()).clone();
    Arc::new(Postgres::new(Connections::Shared(pool), options, config, owner))
}

fn set_up(connection: &mut PgConnection) -> std::pin::Pin<Box<dyn Future<Output = Result<(), sqlx::Error>> + Send + '_>> {
    Box::pin(async { connection.execute(SETUP).await.map(drop) })
}

fn quoted(table: &str) -> String {
    // Checked to have no sign that would have to be quoted in turn.
    table.split('.').map(|part| format!("\"{part}\"")).collect::<Vec<_>>().join(".")
}

/// Returns the two statements of an uncontended cycle, and what [`enter_one`](Postgres::enter_one) and
/// [`change_one`](Postgres::change_one) give to them.
pub(crate) fn uncontended(config: &SqlConfig) -> [Statement; 2] {
    let statements = Statements::new(&quoted(&config.table), millis(config.timeout / 2), config.strict_expiry);
    let [open, save] = [statements.enter_existing, statements.change_one[1][1].clone()].map(|sql| sql.as_str().to_owned());
    [
        Statement { sql: open, values: vec!["key", "token", "lease", "owner", "process"] },
        Statement { sql: save, values: vec!["key", "prev", "token", "ttl", "write", "data"] },
    ]
}

impl Postgres {
    fn new(connections: Connections<sqlx::Postgres>, options: PgConnectOptions, config: &SqlConfig, owner: Owner) -> Self {
        let table = quoted(&config.table);
        let name = config.table.rsplit('.').next().unwrap_or_default();
        // At most 63 characters count.
        let index = format!("\"{}_expires\"", &name[..name.len().min(55)]);
        let statements = Statements::new(&table, millis(config.timeout / 2), config.strict_expiry);
        let server = Arc::new(Server { connections, timeout: config.timeout });
        // Holders whose lock is a transaction are shown by that, and waited for in the database.
        let leased = config.lock == SqlLockMode::Lease;
        let options = (config.listen && leased).then_some(options);
        let listener = Listener::new(owner.process, &server, Leave(statements.leave.clone()), options);
        let holds = transaction::name_of(&config.table);
        let (finds, strict) = (Default::default(), config.strict_expiry);
        Self { server, listener, statements, owner, table, index, holds, finds, strict }
    }

    async fn ask(&self, sql: &SqlStr, parameters: Parameters) -> Result<Vec<PgRow>, Failure> {
        self.server.ask(sql, parameters).await
    }

    /// The number of our liveness lock, while we hold it.
    fn process(&self) -> Option<i64> {
        self.listener.process()
    }

    async fn enter_one(&self, entry: &Enter) -> Result<Option<Entered>, Failure> {
        let arguments = || {
            let arguments = Parameters::new().add(&*entry.key)?.add(bytes(entry.token))?.add(entry.lease)?;
            arguments.add(&*self.owner.text)?.add(self.process())
        };
        for _ in 0..TURNS {
            let (sql, arguments) = match entry.want {
                Want::Existing => (&self.statements.enter_existing, arguments()?),
                want => (&self.statements.enter_any, arguments()?.add(want == Want::Any)?),
            };
            let rows = self.ask(sql, arguments).await?;
            match rows.first().map(|row| entered(row, false)).transpose()? {
                // An absent row has nothing to show.
                None if entry.want == Want::Existing => return Ok(Some(Entered::Absent)),
                None | Some(None) => {}
                Some(entered) => return Ok(entered),
            }
        }
        Err(restless())
    }

    /// Does a change of one session by its lean statement; says `None` if that found nothing to change.
    async fn change_one(&self, change: &Alter) -> Result<Option<Verdict>, Failure> {
        if let (Basis::Written(prev), Action::Write { id, .. }) = (change.basis, &change.action)
            && prev == *id
        {
            // A repeat of the write that it is based on, which the lean one would do once more.
            return Ok(None);
        }
        let arguments = Parameters::new().add(&*change.key)?;
        let (sql, arguments) = match (change.basis, &change.action) {
            (Basis::Written(prev), action) if !(self.strict && change.lease.is_some() && change.token.is_none()) => {
                let token = change.token.filter(|_| change.lease.is_some()).map(bytes);
                let arguments = arguments.add(&prev.to_bytes()[..])?.add(token)?;
                let closes = usize::from(change.lease.is_some() && change.then == Then::Close);
                match action {
                    Action::Write { id, data, ttl } => {
                        let arguments = arguments.add(length(*ttl))?.add(&id.to_bytes()[..])?.add(&**data)?;
                        (&self.statements.change_one[1][closes], arguments)
                    }
                    Action::Touch { ttl } => (&self.statements.change_one[0][closes], arguments.add(length(*ttl))?),
                }
            }
            (Basis::Unseen, Action::Write { id, data, ttl }) => {
                let arguments = arguments.add(&**data)?.add(&id.to_bytes()[..])?.add(length(*ttl))?;
                match change.token.filter(|_| change.takes()) {
                    Some(token) => {
                        let arguments = arguments.add(bytes(token))?.add(change.lease)?.add(&*self.owner.text)?;
                        (&self.statements.insert_locked, arguments.add(self.process())?)
                    }
                    None => (&self.statements.insert, arguments),
                }
            }
            _ => return Ok(None),
        };
        Ok((!self.ask(sql, arguments).await?.is_empty()).then_some(Verdict::Applied))
    }
}

impl fmt::Debug for Postgres {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Postgres").field("table", &self.table).field("listener", &self.listener).finish_non_exhaustive()
    }
}

#[async_trait]
impl Database for Postgres {
    async fn enter(&self, entries: &[Enter]) -> Result<Vec<Option<Entered>>, Failure> {
        self.listener.start();
        match entries {
            [entry] if entry.book == 0 && !entry.probe => Ok(vec![self.enter_one(entry).await?]),
            // On the heap, so that a lone request does not carry the room for it.
            [entry] => {
                Box::pin(in_turns(|| self.judge_entries(slice::from_ref(&entry), &self.statements.enter.alone))).await
            }
            _ => Box::pin(self.enter_many(entries)).await,
        }
    }

    async fn change(&self, changes: &[Alter]) -> Result<Vec<Option<Verdict>>, Failure> {
        let [change] = changes else { return Box::pin(self.change_many(changes)).await };
        match self.change_one(change).await? {
            Some(verdict) => Ok(vec![Some(verdict)]),
            None => Box::pin(in_turns(|| self.judge_changes(slice::from_ref(&change), &self.statements.change.alone))).await,
        }
    }

    async fn look(&self, key: &str) -> Result<Found, Failure> {
        let rows = self.ask(&self.statements.look, Parameters::new().add(key)?).await?;
        rows.first().map_or(Ok(Found::Absent), |row| found(row, 0))
    }

    async fn remove(&self, removal: &Remove) -> Result<Option<Record>, Failure> {
        for _ in 0..TURNS {
            let arguments = Parameters::new()
                .add(&*removal.key)?
                .add(removal.token.map(bytes))?
                .add(removal.lease)?
                .add(&removal.mark.to_bytes()[..])?
                .add(removal.trace)?
                .add(removal.then == Then::Close)?;
            if let Some(row) = self.ask(&self.statements.remove, arguments).await?.first() {
                let Some(data) = field::<Option<Vec<u8>>>(row, 0)? else { return Ok(None) };
                return Ok(Some(Record::new(data, Ttl::new(span(field(row, 1)?)))));
            }
        }
        Err(restless())
    }

    async fn renew(&self, leases: &[Renew]) -> Result<Vec<Renewed>, Failure> {
        for _ in 0..TURNS {
            let arguments = Parameters::new()
                .add(list(leases, |lease| &*lease.key))?
                .add(list(leases, |lease| bytes(lease.token)))?
                .add(list(leases, |lease| lease.lease))?
                .add(list(leases, |lease| lease.protects))?
                .add(self.process())?;
            let rows = self.ask(&self.statements.renew, arguments).await?;
            let renewed = |row: &PgRow| {
                Ok(match field::<i16>(row, 0)? {
                    1 => Some(Renewed::Renewed),
                    2 => Some(Renewed::Ended),
                    3 => Some(Renewed::Gone),
                    _ => None,
                })
            };
            // Renewing twice is as good as once.
            if let Some(renewed) = rows.iter().map(renewed).collect::<Result<Option<Vec<_>>, Failure>>()? {
                return Ok(renewed);
            }
        }
        Err(restless())
    }

    async fn leave(&self, key: &str, token: LeaseToken, clean: bool) -> Result<bool, Failure> {
        let arguments = || Parameters::new().add(key)?.add(bytes(token))?.add(clean);
        if !self.ask(&self.statements.release, arguments()?).await?.is_empty() {
            return Ok(true);
        }
        self.ask(&self.statements.leave, arguments()?.add(false)?).await?.first().map_or(Ok(false), |row| field(row, 0))
    }

    async fn gc(&self, limit: u32) -> Result<u64, Failure> {
        let [records, rest] = self.statements.gc.each_ref().map(|[find, free]| (find, free));
        let clear = async |(find, free), limit, finds| {
            let search = async || {
                let found = self.ask(find, Parameters::new()).await?;
                found.iter().map(|row| field(row, 0)).collect()
            };
            let free = async |keys: Vec<String>| {
                let freed = self.ask(free, Parameters::new().add(keys)?).await?;
                let freed: i64 = freed.first().map_or(Ok(0), |row| field(row, 0))?;
                Ok(u32::try_from(freed).unwrap_or(u32::MAX))
            };
            in_pieces(limit, finds, search, free).await
        };
        let [expired, traces] = &self.finds;
        let freed = clear(records, limit, expired).await?;
        // What is left of others goes last, so that an answer of zero says that no record has expired.
        clear(rest, limit - freed, traces).await?;
        Ok(u64::from(freed))
    }

    async fn list(&self, prefix: &str, after: Option<&str>, limit: u32) -> Result<Vec<Listed>, Failure> {
        let arguments = Parameters::new().add(prefix)?.add(after.unwrap_or_default())?.add(i64::from(limit))?;
        let listed = |row: &PgRow| {
            let bytes: i64 = field(row, 1)?;
            Ok(Listed { key: field(row, 0)?, bytes: u64::try_from(bytes).unwrap_or(0), left: span(field(row, 2)?) })
        };
        self.ask(&self.statements.list, arguments).await?.iter().map(listed).collect()
    }

    async fn locks(&self, prefix: &str, limit: u32) -> Result<Vec<Locked>, Failure> {
        let arguments = Parameters::new().add(prefix)?.add(i64::from(limit))?;
        let locked = |row: &PgRow| {
            let holder = holder(field(row, 1)?, field(row, 2)?);
            Ok(Locked { key: field(row, 0)?, holder, left: span(field(row, 3)?), wanted: field(row, 4)? })
        };
        self.ask(&self.statements.locks, arguments).await?.iter().map(locked).collect()
    }

    async fn unlock(&self, key: &str) -> Result<bool, Failure> {
        let arguments = Parameters::new().add(key)?.add(None::<Vec<u8>>)?.add(false)?.add(false)?;
        self.ask(&self.statements.leave, arguments).await?.first().map_or(Ok(false), |row| field(row, 0))
    }

    async fn create_table(&self) -> Result<(), Failure> {
        // Asked first: whoever may not make a table need not, if it is there.
        if self.version().await?.is_some() {
            return Ok(());
        }
        let sql = AssertSqlSafe(schema(&self.table, &self.index)).into_sql_str();
        match self.ask(&sql, Parameters::new()).await {
            // Of two who make it at the same moment one is refused by the catalogue, once the other's is there as a whole.
            Err(failure) if self.version().await?.is_none() => Err(failure),
            _ => Ok(()),
        }
    }

    async fn check(&self) -> Result<(), Failure> {
        match self.version().await? {
            None => Err(Failure::new(ErrorKind::Config, "the table is missing; make it with create=on or create_table()")),
            Some(Standing { comment, .. }) if comment.as_deref() != Some(VERSION) => Err(Failure::new(
                ErrorKind::Config,
                "the table is not one that this version can use; take another one with table=",
            )),
            Some(Standing { standby: true, .. }) => Err(Failure::new(
                ErrorKind::Unavailable,
                "the database takes no writes: it is a standby, or was made read only",
            )),
            Some(Standing { granted: false, .. }) => Err(Failure::new(
                ErrorKind::Config,
                "the user may not do this; grant SELECT, INSERT, UPDATE and DELETE on the table",
            )),
            Some(Standing { version, .. }) if version < 120_000 => Err(Failure::new(
                ErrorKind::Config,
                format!("PostgreSQL 12 is needed at least, this is {}", version / 10_000),
            )),
            Some(_) => Ok(()),
        }
    }

    async fn show_life(&self) {
        self.listener.heard().await;
    }

    fn transactions(self: Arc<Self>) -> Option<Arc<dyn Transactions>> {
        Some(self)
    }

    async fn waiter(&self, token: LeaseToken) -> Option<Box<dyn Waiter>> {
        self.listener.register(token).await
    }
}

/// What the server says about itself and the table.
struct Standing {
    comment: Option<String>,
    granted: bool,
    standby: bool,
    version: i32,
}

impl Postgres {
    /// Asks for the table; `None` if there is none.
    async fn version(&self) -> Result<Option<Standing>, Failure> {
        const SQL: &str = "SELECT obj_description(c.oid, 'pg_class'),
          has_table_privilege(c.oid, 'SELECT') AND has_table_privilege(c.oid, 'INSERT') AND has_table_privilege(c.oid, 'UPDATE')
            AND has_table_privilege(c.oid, 'DELETE'),
          pg_is_in_recovery() OR current_setting('transaction_read_only')::bool, current_setting('server_version_num')::int4
        FROM (SELECT to_regclass($1) AS oid) c WHERE c.oid IS NOT NULL";
        let rows = self.ask(&SqlStr::from_static(SQL), Parameters::new().add(&*self.table)?).await?;
        let Some(row) = rows.first() else { return Ok(None) };
        Ok(Some(Standing {
            comment: field(row, 0)?,
            granted: field(row, 1)?,
            standby: field(row, 2)?,
            version: field(row, 3)?,
        }))
    }
}

fn length(ttl: Ttl) -> i64 {
    millis(ttl.as_duration())
}

/// Reads what an enter answered; `None` if it has to be asked again.
fn entered(row: &PgRow, booking: bool) -> Result<Option<Entered>, Failure> {
    Ok(match field::<i16>(row, 0)? {
        1 => {
            let clean = field::<Option<bool>>(row, 4)?.unwrap_or(false);
            Some(Entered::Granted { found: found(row, 1)?, clean })
        }
        2 => Some(Entered::Absent),
        3 => {
            let left = field::<Option<i64>>(row, 7)?.unwrap_or(0);
            let booked = booking && field(row, 8)?;
            Some(Entered::Busy(Busy { holder: holder(field(row, 5)?, field(row, 6)?), left: span(left), booked }))
        }
        _ => None,
    })
}

/// Reads data, last write, and what is left, beginning at `index`.
fn found(row: &PgRow, index: usize) -> Result<Found, Failure> {
    let Some(last) = field::<Option<&[u8]>>(row, index + 1)? else { return Ok(Found::Absent) };
    let last = WriteId::from_bytes(last.try_into().map_err(|_| errors::strange())?);
    let left = field::<Option<i64>>(row, index + 2)?.unwrap_or(0);
    Ok(match field::<Option<Vec<u8>>>(row, index)? {
        Some(data) if left > 0 => Found::Live { last, record: Record::new(data, Ttl::new(span(left))) },
        _ => Found::Buried { mark: last },
    })
}

/// Has a request judged, again as long as somebody else was a little faster.
async fn in_turns<T, F>(judge: impl Fn() -> F) -> Result<Vec<Option<T>>, Failure>
where
    F: Future<Output = Result<Vec<Option<T>>, Failure>>,
{
    for _ in 0..TURNS {
        let judged = judge().await?;
        if judged.iter().any(Option::is_some) {
            return Ok(judged);
        }
    }
    Err(restless())
}

/// Somebody else was always a little faster.
fn restless() -> Failure {
    Failure::new(ErrorKind::Unavailable, "the row of the session was changed again and again")
}
