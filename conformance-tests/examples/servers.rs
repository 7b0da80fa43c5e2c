//! Starts a PostgreSQL, a MariaDB and a memcached server of its own, says where they are, one DSN a line, and ends with them when stdin ends.
//!
//! For measuring, and for trying something out: what a commit has acknowledged is on the disk, and no log is as small as a test wants it,
//! where PostgreSQL would make a new file for each megabyte and a checkpoint every few seconds.

use std::io::{self, Read};

use conformance_tests::servers::{MariaDb, Memcached, Postgres};

fn main() -> io::Result<()> {
    let postgres = Postgres::start(&[
        "fsync = on",
        "full_page_writes = on",
        "autovacuum = on",
        "shared_buffers = 256MB",
        // As it comes.
        "min_wal_size = 80MB",
        "max_wal_size = 1GB",
    ])?;
    let mariadb = MariaDb::start(&[
        "innodb_flush_log_at_trx_commit = 1",
        "innodb_flush_method = O_DIRECT",
        "innodb_buffer_pool_size = 256M",
        // As much as PostgreSQL has. With less, a write now and then waits until pages are written that the log is needed for no more.
        "innodb_log_file_size = 1G",
    ])?;
    let memcached = Memcached::start(&[])?;
    println!("{}\n{}\n{}", postgres.url(), mariadb.url(), memcached.url());
    io::stdin().read_to_end(&mut Vec::new()).map(drop)
}
