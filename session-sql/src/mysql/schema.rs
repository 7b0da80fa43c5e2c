//! The table: how it is made, and whether the one that is there can be used, by this user, on this server.

use session_core::ErrorKind;

use super::errors;
use super::link::{Given, Link, number, text};
use super::texts::{Text, Texts};
use crate::database::Failure;

/// What stands in the comment of a table that this version has made.
const VERSION: &str = "sessionkit 1";

/// The columns and their types, in order.
const COLUMNS: [(&str, &str); 16] = [
    ("id", "varbinary(512)"),
    ("data", "longblob"),
    ("write_id", "binary(16)"),
    ("expires_at", "bigint"),
    ("expires_minute", "bigint"),
    ("lock_token", "binary(16)"),
    ("lock_until", "bigint"),
    ("lock_since", "bigint"),
    ("lock_lease", "bigint"),
    ("lock_owner", "varbinary(255)"),
    ("lock_process", "bigint"),
    ("lock_handed", "tinyint"),
    ("want_token", "binary(16)"),
    ("want_until", "bigint"),
    ("want_process", "bigint"),
    ("want_since", "bigint"),
];

/// What is to be known of a server.
#[derive(Debug)]
pub(super) struct Server {
    /// Whether it can pass by rows that somebody has locked.
    pub(super) skips: bool,
    /// Whether it can be told not to wait for a row at all: it is MariaDB.
    pub(super) hurries: bool,
    /// Whether it is one server, and not a cluster whose nodes do not know of each other's `GET_LOCK`.
    pub(super) alone: bool,
}

/// Makes the table if there is none of its name.
pub(super) async fn create(link: &Link, texts: &Texts) -> Result<(), Failure> {
    let column = |(name, kind): &(&str, &str)| match *name {
        "id" | "expires_at" | "expires_minute" => format!("{name} {kind} NOT NULL"),
        "lock_handed" => format!("{name} {kind} NOT NULL DEFAULT 0"),
        _ => format!("{name} {kind} NULL"),
    };
    let columns: Vec<_> = COLUMNS.iter().map(column).collect();
    let sql = format!(
        "CREATE TABLE IF NOT EXISTS {} ({},PRIMARY KEY (id),KEY expires (expires_minute)) ENGINE=InnoDB COMMENT='{VERSION}'",
        texts.table,
        columns.join(",")
    );
    match link.ask(&[&plain(sql)], &Given::default()).await {
        Ok(_) => Ok(()),
        // It is forbidden even where there is nothing to make.
        Err(failure) if failure.message == errors::RIGHTS => match link.ask(&[&texts.look], &Given::default()).await {
            Ok(_) => Ok(()),
            Err(_) => Err(Failure { message: "the user may not make the table: that takes CREATE".into(), ..failure }),
        },
        Err(failure) => Err(failure),
    }
}

/// Asks whether server, table and rights will do.
pub(super) async fn check(link: &Link, texts: &Texts) -> Result<Server, Failure> {
    let config = |text: String| Err(Failure::new(ErrorKind::Config, text));
    let server = "SELECT VERSION(),@@autocommit,@@max_allowed_packet";
    let answers = link.ask(&[&plain(server.to_owned())], &Given::default()).await?;
    let Some(row) = answers.first().and_then(|answer| answer.rows.first()) else {
        return Err(Failure::unexpected("the server does not say what it is"));
    };
    let version = text(row, 0)?.unwrap_or_default();
    let Some(skips) = skips(&version) else {
        return config("the server is too old: MySQL 8.0 or MariaDB 10.5 at least".into());
    };
    if number(row, 1)? != Some(1) {
        return config("the connections of the pool do not commit by themselves: leave autocommit on".into());
    }
    if let Some(size) = number(row, 2)?.and_then(|size| usize::try_from(size).ok()) {
        link.packet.store(size, std::sync::atomic::Ordering::Relaxed);
    }

    let name = texts.table.replace('`', "");
    let (schema, name) = name.split_once('.').map_or(("DATABASE()".to_owned(), &*name), |(s, n)| (format!("'{s}'"), n));
    let table = format!(
        "SELECT ENGINE,TABLE_COMMENT FROM information_schema.TABLES WHERE TABLE_SCHEMA={schema} AND TABLE_NAME='{name}'"
    );
    let columns = format!(
        "SELECT COLUMN_NAME,COLUMN_TYPE FROM information_schema.COLUMNS WHERE TABLE_SCHEMA={schema} AND TABLE_NAME='{name}' \
         ORDER BY ORDINAL_POSITION"
    );
    // What is not there, and whoever may not see it, is refused here in words of its own.
    let rights: Vec<_> = texts.rights.iter().collect();
    link.ask(&[&texts.look], &Given::default()).await?;
    link.ask(&rights, &Given::default()).await?;
    let answers = link.ask(&[&plain(table), &plain(columns)], &Given::default()).await?;
    let [table, columns] = &answers[..] else {
        return Err(Failure::unexpected("the server does not describe the table"));
    };
    let Some(row) = table.rows.first() else {
        return config("the name of the table is that of something else".into());
    };
    if !text(row, 0)?.is_some_and(|engine| engine.eq_ignore_ascii_case("innodb")) {
        return config("the table is not kept by InnoDB, so that a crash could take sessions: name another one".into());
    }
    let comment = text(row, 1)?.unwrap_or_default();
    let mut there = Vec::new();
    for row in &columns.rows {
        // Some versions write the width for display behind the type.
        let kind = text(row, 1)?.unwrap_or_default().to_ascii_lowercase();
        let kind = kind.split_once("int(").map_or(kind.clone(), |(size, _)| format!("{size}int"));
        there.push((text(row, 0)?.unwrap_or_default(), kind));
    }
    let whole = COLUMNS.iter().all(|(name, kind)| there.iter().any(|(n, k)| n == name && k == kind));
    if comment != VERSION || !whole {
        let other = comment.strip_prefix("sessionkit ").filter(|other| VERSION.strip_prefix("sessionkit ") != Some(*other));
        let other = other.filter(|other| other.bytes().all(|byte| byte.is_ascii_digit()));
        return config(match other {
            Some(other) => format!("the table is of version {other}, and this is version 1: name another one"),
            None => "the table is not one of sessionkit: name another one, and write create=on".into(),
        });
    }

    let cluster = "SHOW GLOBAL VARIABLES WHERE Variable_name IN ('wsrep_on','group_replication_group_name')";
    let answers = link.ask(&[&plain(cluster.to_owned())], &Given::default()).await?;
    let mut alone = true;
    for row in answers.iter().flat_map(|answer| &answer.rows) {
        alone &= matches!(&*text(row, 1)?.unwrap_or_default(), "" | "OFF");
    }
    Ok(Server { skips, hurries: version.contains("MariaDB"), alone })
}

/// Whether a server of this version can skip locked rows; `None` if it is too old for the rest.
fn skips(version: &str) -> Option<bool> {
    // MariaDB used to say 5.5.5 before its version, for old replicas.
    let text = version.strip_prefix("5.5.5-").unwrap_or(version);
    let mut numbers = text.split(|c: char| !c.is_ascii_digit()).map(|number| number.parse::<u32>().unwrap_or(0));
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    match text.contains("MariaDB") {
        true => (version >= (10, 5)).then_some(version >= (10, 6)),
        false => (version >= (8, 0)).then_some(true),
    }
}

fn plain(sql: String) -> Text {
    Text { sql: sql.into(), params: Vec::new() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_says_by_its_version_what_it_can() {
        assert_eq!(skips("8.0.36"), Some(true));
        assert_eq!(skips("9.4.0-log"), Some(true));
        assert_eq!(skips("5.7.44"), None);
        assert_eq!(skips("10.11.19-MariaDB-0+deb12u1"), Some(true));
        assert_eq!(skips("5.5.5-10.5.9-MariaDB"), Some(false));
        assert_eq!(skips("10.4.1-MariaDB"), None);
        assert_eq!(skips("whatever"), None);
    }
}
