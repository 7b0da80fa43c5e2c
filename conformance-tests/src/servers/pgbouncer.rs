//! PgBouncer of its own for each test, before a PostgreSQL server: many clients share few connections, one transaction after another.
//!
//! Nothing here knows tables or statements of a backend.

use std::fmt;
use std::fs;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use super::postgres::{ACCOUNTS, Postgres, SUPERUSER};
use super::postgres_wire::PostgresConnection;
use super::process::{Account, Port, Program, Server, on_free_ports};
use super::sql::{self, NAME, PASSWORD};

const PROGRAM: Program = Program { name: "pgbouncer", package: "pgbouncer" };

/// Hands a server connection on after each transaction; answers on the loopback and on a socket in its directory only.
///
/// What is ignored is what clients of PostgreSQL commonly say in the beginning, and what this one would refuse them for.
const SETTINGS: &str = "\
[pgbouncer]
listen_addr = 127.0.0.1
unix_socket_dir = .
auth_type = hba
auth_hba_file = hba.conf
auth_file = users.txt
admin_users = postgres
pool_mode = transaction
max_client_conn = 500
ignore_startup_parameters = extra_float_digits
";

/// Whom it asks for a password.
const HBA: &str = "\
local all all trust
host all all 127.0.0.1/32 scram-sha-256
";

const CONFIG: &str = "pgbouncer.ini";

/// Its own database, in which it is told what to do and asked how it goes.
const CONSOLE: &str = "pgbouncer";

/// PgBouncer in transaction mode before a [`Postgres`].
///
/// Dropping it kills it. It can be started, and lives on, while the server is down.
pub struct PgBouncer {
    server: Server,
    port: Port,
}

impl fmt::Debug for PgBouncer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PgBouncer").field("address", &self.address()).field("pid", &self.pid()).finish_non_exhaustive()
    }
}

impl PgBouncer {
    /// Starts it before a server and returns once it answers. Each option is a line of its configuration file, such as
    /// `"default_pool_size = 1"`, `"pool_mode = session"` or `"query_wait_timeout = 1"`.
    ///
    /// # Errors
    /// `NotFound` with the name of the package if PgBouncer is not installed; with its own words if it does not like an option.
    pub fn start(postgres: &Postgres, options: &[&str]) -> io::Result<Self> {
        on_free_ports(|| {
            let bouncer = Self::prepare(postgres, options)?;
            bouncer.restart()?;
            Ok(bouncer)
        })
    }

    /// Makes all but the process.
    fn prepare(postgres: &Postgres, options: &[&str]) -> io::Result<Self> {
        let account = Account::unprivileged(ACCOUNTS)?;
        let (directory, port) = (account.directory("pgbouncer-")?, Port::free()?);
        let (host, number) = (postgres.directory().display(), postgres.port());
        // The socket, which believes us who a client is.
        let databases = format!("[databases]\n{NAME} = host='{host}' port={number}");
        let port_line = format!("listen_port = {}", port.number());
        let config = [&[databases.as_str(), SETTINGS, &port_line], options].concat().join("\n") + "\n";
        let users = format!("\"{NAME}\" \"{PASSWORD}\"\n\"{SUPERUSER}\" \"\"\n");
        for (name, text) in [(CONFIG, config.as_str()), ("hba.conf", HBA), ("users.txt", &users)] {
            let file = directory.path().join(name);
            fs::write(&file, text)?;
            account.own(&file)?;
        }
        let server = Server::new(&PROGRAM, directory, vec![CONFIG.to_owned()])?.run_by(account);
        Ok(Self { server, port })
    }

    /// Returns the port that it listens on, the same for life.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port.number()
    }

    /// Returns the address that it listens on.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.port.address()
    }

    /// Returns `postgres://sessionkit:password@127.0.0.1:port/sessionkit`.
    #[must_use]
    pub fn url(&self) -> String {
        self.url_of(NAME, PASSWORD)
    }

    /// Returns the same for another user. It knows none, unless `"auth_query = …"` and `"auth_user = postgres"` are among its options.
    #[must_use]
    pub fn url_of(&self, user: &str, password: &str) -> String {
        sql::url("postgres", user, password, self.address())
    }

    /// Returns the path of the socket that it listens on besides, in the directory that a client is told as the host. It lets in
    /// everybody who can reach it as one of the two users that it knows: `sessionkit` and `postgres`, who may do everything.
    #[must_use]
    pub fn socket_path(&self) -> PathBuf {
        self.server.directory().join(format!(".s.PGSQL.{}", self.port()))
    }

    /// Returns its directory, which is gone with it.
    #[must_use]
    pub fn directory(&self) -> &Path {
        self.server.directory()
    }

    /// Returns the id of its process, `None` after [`kill`](Self::kill).
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        self.server.pid()
    }

    /// Says whether it runs and is not frozen.
    #[must_use]
    pub fn is_up(&self) -> bool {
        self.server.is_up()
    }

    /// Stops it, as a suspended machine or an overloaded host does, and returns once it stands still: connections stay open, new ones are accepted, and nothing is answered. It can be killed and dropped like this.
    ///
    /// # Errors
    /// `NotConnected` if it does not run.
    pub fn freeze(&self) -> io::Result<()> {
        self.server.freeze()
    }

    /// Ends a [`freeze`](Self::freeze).
    ///
    /// # Errors
    /// `NotConnected` if it does not run.
    pub fn resume(&self) -> io::Result<()> {
        self.server.resume()
    }

    /// Kills it, and returns once it is gone: the server behind it goes on. Its port refuses connections and is given to nobody else. One that
    /// does not run stays so.
    ///
    /// # Errors
    /// Those of the operating system.
    pub fn kill(&self) -> io::Result<()> {
        self.server.kill()
    }

    /// Starts it again, after killing it if it runs, on the same port. Returns once it answers, whatever the server behind it does.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    pub fn restart(&self) -> io::Result<()> {
        self.server.spawn()?;
        // Asked on the socket, where nobody else can answer in its place.
        self.server.wait(|| Ok(!self.console("SHOW VERSION")?.is_empty()))?;
        // It would do with the socket alone.
        if self.server.found_its_port_taken() {
            self.kill()?;
            return Err(io::Error::new(io::ErrorKind::AddrInUse, "pgbouncer finds its port taken"));
        }
        Ok(())
    }

    /// Does one or more statements, as a user who may do everything, on a connection of its own, and through this to the server; see
    /// [`PostgresConnection::query`].
    ///
    /// # Errors
    /// As [`PostgresConnection::query`].
    pub fn query(&self, sql: &str) -> io::Result<Vec<Vec<String>>> {
        self.connect()?.query(sql)
    }

    /// Connects as a user who may do everything.
    ///
    /// # Errors
    /// As [`PostgresConnection::query`].
    pub fn connect(&self) -> io::Result<PostgresConnection> {
        PostgresConnection::open(&self.socket_path(), SUPERUSER, NAME)
    }

    /// Does a command of its own, such as `SHOW POOLS`, `PAUSE` or `KILL sessionkit`, and returns the rows.
    ///
    /// # Errors
    /// As [`PostgresConnection::query`].
    pub fn console(&self, command: &str) -> io::Result<Vec<Vec<String>>> {
        PostgresConnection::open(&self.socket_path(), SUPERUSER, CONSOLE)?.query(command)
    }
}
