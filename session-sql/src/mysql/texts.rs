//! The statements: each text is made once, with the name of the table, and says by name what it is given.
//!
//! Two rules hold in each `SET`. An expression reads only columns that are assigned behind it or by it, so that it makes no
//! difference whether the server assigns from left to right, as it does, or all at once, as some of its modes do. And every
//! instant comes from one clock, that of the server in UTC, so that no time zone comes in, whatever it is set to.
//!
//! Nothing here knows connections.

use crate::database::{CLAIM, REMEMBER, SAME};
use crate::pieces::MOST;

/// Milliseconds since 1970, the same everywhere in a statement.
pub(super) const NOW: &str = "(TIMESTAMPDIFF(MICROSECOND,'1970-01-01',UTC_TIMESTAMP(6)) DIV 1000)";

/// There is a record whose deadline lies ahead.
pub(super) const LIVE: &str = "(data IS NOT NULL AND expires_at>{now})";

/// Nobody has the lock, or his lease has ended.
const FREE: &str = "(lock_token IS NULL OR lock_until<={now})";

/// The lock can be taken by `:token`. Somebody who is next in line goes before whoever comes now.
const OPEN: &str = "((lock_token IS NULL OR lock_until<={now}{dead}) AND (want_token IS NULL OR want_until<={now} OR want_token=:token) OR \
    lock_token=:token)";

/// The process of the holder has let go of the lock that it keeps for as long as it lives.
const DEAD: &str = " OR lock_process IS NOT NULL AND IS_FREE_LOCK(CONCAT('sessionkit:',lock_process))=1";

/// Ends a hold: the lock goes to the one next in line, or to nobody. Who that is is known by his token only, until he comes.
const RELEASE: [(&str, &str); 10] = [
    ("lock_owner", "NULL"),
    ("lock_process", "NULL"),
    ("lock_handed", "IF(want_until>{now},{clean},0)"),
    ("lock_since", "IF(want_until>{now},{now},NULL)"),
    ("lock_lease", "IF(want_until>{now},lock_lease,NULL)"),
    ("lock_until", "IF(want_until>{now},{now}+{claim},NULL)"),
    ("lock_token", "IF(want_until>{now},want_token,NULL)"),
    ("want_token", "NULL"),
    ("want_process", "NULL"),
    ("want_until", "NULL"),
];

/// Gives the lock to `:token`.
const TAKE: [(&str, &str); 6] = [
    ("lock_since", "{now}"),
    ("lock_until", "{now}+:lease"),
    ("lock_lease", ":lease"),
    ("lock_owner", ":owner"),
    ("lock_process", ":alive"),
    ("lock_token", ":token"),
];

/// Comes for a lock, and gives up the place next in line for it.
const COME: [(&str, &str); 4] = [
    ("lock_handed", "IF(lock_token<=>:token,lock_handed,0)"),
    ("want_process", "IF(want_token<=>:token,NULL,want_process)"),
    ("want_until", "IF(want_token<=>:token,NULL,want_until)"),
    ("want_token", "IF(want_token<=>:token,NULL,want_token)"),
];

/// A row without record and trace stays until so long after the end of its lock: an ended lease that nobody took over still writes.
const STUB: &str = "{now}+:lease+{remember}";

/// What a statement is given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Param {
    Key,
    Token,
    Lease,
    Owner,
    Alive,
    Process,
    Book,
    Waited,
    Clean,
    Data,
    Write,
    Prev,
    Ttl,
    Stay,
    Protects,
    From,
    To,
    Limit,
    /// One of a list.
    Listed(usize),
}

const PARAMS: [(&str, Param); 18] = [
    ("key", Param::Key),
    ("token", Param::Token),
    ("lease", Param::Lease),
    ("owner", Param::Owner),
    ("alive", Param::Alive),
    ("process", Param::Process),
    ("book", Param::Book),
    ("waited", Param::Waited),
    ("clean", Param::Clean),
    ("data", Param::Data),
    ("write", Param::Write),
    ("prev", Param::Prev),
    ("ttl", Param::Ttl),
    ("stay", Param::Stay),
    ("protects", Param::Protects),
    ("from", Param::From),
    ("to", Param::To),
    ("limit", Param::Limit),
];

impl Param {
    pub(super) fn name(self) -> &'static str {
        PARAMS.iter().find(|(_, known)| *known == self).map_or("", |(name, _)| name)
    }
}

/// A statement with places for what it is given.
#[derive(Debug)]
pub(super) struct Text {
    /// With a question mark at each place.
    pub(super) sql: std::sync::Arc<str>,
    pub(super) params: Vec<Param>,
}

impl Text {
    fn parse(template: &str) -> Self {
        let (mut sql, mut params, mut rest) = (String::new(), Vec::new(), template);
        while let Some((before, after)) = rest.split_once(':') {
            let end = after.find(|c: char| !c.is_ascii_lowercase()).unwrap_or(after.len());
            let (name, after) = after.split_at(end);
            if name.is_empty() {
                sql = sql + before + ":";
                rest = after;
                continue;
            }
            if name == "keys" {
                // As many places as there may be, whatever is given, so that it is one statement.
                params.extend((0..MOST).map(Param::Listed));
                sql = sql + before + &vec!["?"; MOST].join(",");
                rest = after;
                continue;
            }
            let param = PARAMS.iter().find(|(known, _)| *known == name);
            params.push(param.unwrap_or_else(|| unreachable!("a text names {name}, which nobody gives")).1);
            sql = sql + before + "?";
            rest = after;
        }
        Self { sql: (sql + rest).into(), params }
    }
}

/// All of them.
#[derive(Debug)]
pub(super) struct Texts {
    /// The name of the table as it stands in a statement.
    pub(super) table: String,
    /// Takes a lock that is open. By whether a record must be live, whether one is to be prolonged, and whether the dead are looked for.
    take: [[Text; 2]; 3],
    /// Makes a row for an absent id, locked.
    pub(super) stub: Text,
    book: [Text; 2],
    /// What is there after an attempt to take the lock; data only for its holder. By whether data is wanted.
    seen: [Text; 2],
    pub(super) look: Text,
    /// Changes a record that was found. By whether it writes, the access, and whether the lock is given back.
    change: [[[Text; 2]; 3]; 2],
    /// Writes where nothing was found, under a lock. By whether that must not have ended, and whether it is given back.
    fill: [[Text; 2]; 2],
    /// Makes a row with a record. By whether it takes the lock.
    create: [Text; 2],
    /// The same where there is a row. By what becomes of the lock: nothing, taken, given back.
    recreate: [Text; 3],
    /// What a change was judged by.
    pub(super) judge: Text,
    pub(super) release: Text,
    pub(super) unwant: Text,
    /// Removes a row in which nothing is left.
    pub(super) drop: Text,
    /// What is about to be buried, so that it is known afterwards whether it was that.
    pub(super) mark: Text,
    pub(super) removed: Text,
    pub(super) bury: Text,
    pub(super) there: Text,
    /// Leaves a trace where there is no row.
    pub(super) trace: Text,
    pub(super) release_buried: Text,
    pub(super) renew: Text,
    pub(super) renewed: Text,
    pub(super) list: Text,
    pub(super) locks: Text,
    pub(super) unlock: Text,
    /// By whether rows that somebody has locked are skipped: records, and what is none.
    gc: [[[Text; 2]; 2]; 2],
    pub(super) rights: [Text; 3],
}

/// What an exclusive change asks of the lock.
#[derive(Clone, Copy, Debug)]
pub(super) enum Access {
    Optimistic,
    Exclusive,
    Strict,
}

/// What a create does with the lock.
#[derive(Clone, Copy, Debug)]
pub(super) enum Lock {
    Leave,
    Take,
    GiveBack,
}

impl Texts {
    /// Makes them for a table whose name was checked.
    pub(super) fn new(table: &str) -> Self {
        let table = table.split('.').map(|part| format!("`{part}`")).collect::<Vec<_>>().join(".");
        let text = |template: &str| {
            // From the outer to the inner ones.
            let filled = [
                ("{live}", LIVE),
                ("{free}", FREE),
                ("{stub}", STUB),
                ("{take}", &assign(&TAKE)),
                ("{come}", &assign(&COME)),
                ("{t}", &table),
                ("{now}", NOW),
                ("{claim}", &CLAIM.as_millis().to_string()),
                ("{remember}", &REMEMBER.as_millis().to_string()),
            ]
            .iter()
            .fold(template.to_owned(), |text, (name, value)| text.replace(name, value));
            Text::parse(&filled)
        };
        let release = |clean: &str| assign(&RELEASE).replace("{clean}", clean);
        let open = |probe: bool| OPEN.replace("{dead}", if probe { DEAD } else { "" });
        let deadline = "expires_minute=({now}+:ttl) DIV 60000,expires_at={now}+:ttl";

        let take = [(true, true), (false, true), (false, false)].map(|(existing, prolong)| {
            [false, true].map(|probe| {
                let longer = "IF(expires_at>{now},GREATEST(expires_at,{now}+2*:lease),expires_at)";
                let longer = if prolong { longer } else { "expires_at" };
                let expires = format!("IF(data IS NOT NULL,{longer},IF(write_id IS NULL,{{stub}},expires_at))");
                let must = if existing { " AND {live}" } else { "" };
                text(&format!(
                    "UPDATE {{t}} SET expires_minute={expires} DIV 60000,expires_at={expires},\
                     {{come}},{{take}} WHERE id=:key{must} AND {}",
                    open(probe)
                ))
            })
        });
        let book = [false, true].map(|existing| {
            let must = if existing { " AND {live}" } else { "" };
            // Whoever asks again and again writes again only when half of his time is over.
            text(&format!(
                "UPDATE {{t}} SET want_since=IF(want_token<=>:token,want_since,{{now}}-:waited),\
                 want_process=:process,want_until={{now}}+:book,want_token=:token \
                 WHERE id=:key AND NOT (lock_token<=>:token){must} AND \
                 (want_token IS NULL OR want_until<={{now}} OR want_process=:process OR want_token=:token \
                 OR {{now}}-:waited+{SAME}<want_since) \
                 AND NOT (want_token<=>:token AND want_until>{{now}}+:book DIV 2)"
            ))
        });
        let seen = [false, true].map(|data| {
            let data = if data { "IF(lock_token<=>:token AND {live},data,NULL)" } else { "NULL" };
            text(&format!(
                "SELECT lock_token<=>:token,lock_handed,{{live}},{data},write_id,expires_at-{{now}},data IS NOT NULL,lock_owner,\
                 lock_since,lock_until-{{now}},want_token<=>:token FROM {{t}} WHERE id=:key"
            ))
        });
        let change = [false, true].map(|writes| {
            [Access::Optimistic, Access::Exclusive, Access::Strict].map(|access| {
                let lock = match access {
                    Access::Optimistic => "{free}",
                    Access::Exclusive => "(lock_token=:token OR {free})",
                    Access::Strict => "lock_token=:token AND lock_until>{now}",
                };
                [false, true].map(|close| {
                    let data = if writes { "data=:data,write_id=:write," } else { "" };
                    // The repeat of the very write that it is based on.
                    let again = if writes { " AND write_id<>:write" } else { "" };
                    let given = match access {
                        Access::Optimistic => String::new(),
                        // A lock of somebody else has ended here, and with this change its holder has lost what it protected.
                        _ if close => format!(",{}", release("lock_token<=>:token")),
                        _ => String::new(),
                    };
                    text(&format!(
                        "UPDATE {{t}} SET {data}{deadline}{given} WHERE id=:key AND write_id=:prev{again} AND {{live}} AND {lock}"
                    ))
                })
            })
        });
        let fill = [false, true].map(|strict| {
            [false, true].map(|close| {
                let lock = if strict { " AND lock_until>{now}" } else { "" };
                let given = if close { format!(",{}", release("1")) } else { String::new() };
                text(&format!(
                    "UPDATE {{t}} SET {deadline}{given},data=:data,write_id=:write WHERE id=:key AND lock_token=:token{lock} \
                     AND NOT {{live}} AND (write_id IS NULL OR write_id=:prev OR data IS NULL AND expires_at<={{now}})"
                ))
            })
        });
        let create = [false, true].map(|takes| {
            let (columns, values) = match takes {
                true => (
                    ",lock_token,lock_until,lock_since,lock_lease,lock_owner,lock_process",
                    ",:token,{now}+:lease,{now},:lease,:owner,:alive",
                ),
                false => ("", ""),
            };
            text(&format!(
                "INSERT INTO {{t}} (id,data,write_id,expires_at,expires_minute{columns}) \
                 VALUES (:key,:data,:write,{{now}}+:ttl,({{now}}+:ttl) DIV 60000{values})"
            ))
        });
        let recreate = [Lock::Leave, Lock::Take, Lock::GiveBack].map(|lock| {
            let set = match lock {
                Lock::Leave => String::new(),
                Lock::Take => ",lock_handed=0,{take}".to_owned(),
                Lock::GiveBack => format!(",{}", release("lock_token<=>:token")),
            };
            text(&format!(
                "UPDATE {{t}} SET {deadline}{set},data=:data,write_id=:write WHERE id=:key AND NOT {{live}} AND \
                 (write_id IS NULL OR data IS NULL AND expires_at<={{now}} OR data IS NOT NULL AND write_id=:prev) \
                 AND (lock_token=:token OR {{free}})"
            ))
        });
        let range = "id>=:from AND id<:to";
        let over = "expires_minute<={now} DIV 60000 AND expires_at<={now} AND {free}";
        let gc = [false, true].map(|skip| {
            ["data IS NOT NULL", "data IS NULL"].map(|what| {
                let find = text(&format!("SELECT id FROM {{t}} WHERE {over} AND {what} LIMIT :limit"));
                let free = match skip {
                    // In this order: a row that was passed by is not looked at again, and so not waited for.
                    true => text(&format!(
                        "DELETE t FROM (SELECT id FROM {{t}} FORCE INDEX (PRIMARY) WHERE id IN (:keys) AND {over} AND {what} \
                         LIMIT :limit FOR UPDATE SKIP LOCKED) AS old STRAIGHT_JOIN {{t}} AS t FORCE INDEX (PRIMARY) ON t.id=old.id"
                    )),
                    false => text(&format!("DELETE FROM {{t}} WHERE id IN (:keys) AND {over} AND {what}")),
                };
                [find, free]
            })
        });

        Self {
            take,
            stub: text(
                "INSERT IGNORE INTO {t} (id,expires_at,expires_minute,lock_token,lock_until,lock_since,lock_lease,lock_owner,\
                 lock_process) SELECT :key,{stub},({stub}) DIV 60000,:token,{now}+:lease,{now},:lease,:owner,:alive FROM DUAL \
                 WHERE NOT EXISTS (SELECT 1 FROM {t} AS there WHERE there.id=:key)",
            ),
            book,
            seen,
            look: text(
                "SELECT {live},IF({live},data,NULL),write_id,expires_at-{now},data IS NOT NULL FROM {t} WHERE id=:key",
            ),
            change,
            fill,
            create,
            recreate,
            judge: text(
                "SELECT {live},write_id,expires_at-{now},data IS NOT NULL,lock_token<=>:token,COALESCE(lock_until>{now},0) \
                 FROM {t} WHERE id=:key",
            ),
            release: text(&format!("UPDATE {{t}} SET {} WHERE id=:key AND lock_token=:token", release(":clean"))),
            unwant: text(
                "UPDATE {t} SET want_token=NULL,want_until=NULL,want_process=NULL WHERE id=:key AND want_token=:token",
            ),
            drop: text("DELETE FROM {t} WHERE id=:key AND data IS NULL AND write_id IS NULL AND lock_token IS NULL"),
            mark: text("SET @sessionkit_buried=(SELECT write_id FROM {t} WHERE id=:key)"),
            removed: text(
                "SELECT IF({live},data,NULL),expires_at-{now} FROM {t} WHERE id=:key AND write_id<=>@sessionkit_buried",
            ),
            bury: text(
                "UPDATE {t} SET expires_minute=({now}+GREATEST(:stay,COALESCE(2*lock_lease,0))) DIV 60000,\
                 expires_at={now}+GREATEST(:stay,COALESCE(2*lock_lease,0)),data=NULL,write_id=:write \
                 WHERE id=:key AND write_id<=>@sessionkit_buried",
            ),
            there: text("SELECT 1 FROM {t} WHERE id=:key"),
            trace: text(
                "INSERT IGNORE INTO {t} (id,write_id,expires_at,expires_minute) \
                 VALUES (:key,:write,{now}+:stay,({now}+:stay) DIV 60000)",
            ),
            release_buried: text(&format!(
                "UPDATE {{t}} SET {} WHERE id=:key AND lock_token=:token AND write_id=:write",
                release("1")
            )),
            renew: text(
                "UPDATE {t} SET expires_minute=IF(data IS NULL,IF(write_id IS NULL,{stub},expires_at),\
                 IF(:protects,GREATEST(expires_at,{now}+2*:lease),expires_at)) DIV 60000,\
                 expires_at=IF(data IS NULL,IF(write_id IS NULL,{stub},expires_at),\
                 IF(:protects,GREATEST(expires_at,{now}+2*:lease),expires_at)),\
                 lock_process=:alive,lock_until={now}+:lease WHERE id=:key AND lock_token=:token AND (NOT :protects OR {live})",
            ),
            renewed: text("SELECT lock_token<=>:token,{live} FROM {t} WHERE id=:key"),
            list: text(&format!(
                "SELECT id,LENGTH(data),expires_at-{{now}} FROM {{t}} WHERE {range} AND {{live}} ORDER BY id LIMIT :limit"
            )),
            locks: text(&format!(
                "SELECT id,lock_owner,lock_since,lock_until-{{now}},COALESCE(want_until>{{now}},0) FROM {{t}} WHERE {range} \
                 AND lock_token IS NOT NULL AND lock_until>{{now}} ORDER BY id LIMIT :limit"
            )),
            unlock: text(&format!(
                "UPDATE {{t}} SET {} WHERE id=:key AND lock_token IS NOT NULL AND lock_until>{{now}}",
                release("0")
            )),
            gc,
            rights: [
                text("UPDATE {t} SET lock_token=NULL WHERE id=:key"),
                text(
                    "INSERT INTO {t} (id,expires_at,expires_minute) SELECT id,expires_at,expires_minute FROM {t} AS there \
                     WHERE there.id=:key",
                ),
                text("DELETE FROM {t} WHERE id=:key"),
            ],
            table,
        }
    }

    pub(super) fn take(&self, existing: bool, prolong: bool, probe: bool) -> &Text {
        let kind = match (existing, prolong) {
            (true, _) => 0,
            (false, true) => 1,
            (false, false) => 2,
        };
        &self.take[kind][usize::from(probe)]
    }

    pub(super) fn book(&self, existing: bool) -> &Text {
        &self.book[usize::from(existing)]
    }

    pub(super) fn seen(&self, data: bool) -> &Text {
        &self.seen[usize::from(data)]
    }

    pub(super) fn change(&self, writes: bool, access: Access, close: bool) -> &Text {
        &self.change[usize::from(writes)][access as usize][usize::from(close)]
    }

    pub(super) fn fill(&self, strict: bool, close: bool) -> &Text {
        &self.fill[usize::from(strict)][usize::from(close)]
    }

    pub(super) fn create(&self, takes: bool) -> &Text {
        &self.create[usize::from(takes)]
    }

    pub(super) fn recreate(&self, lock: Lock) -> &Text {
        &self.recreate[lock as usize]
    }

    pub(super) fn gc(&self, skip: bool) -> &[[Text; 2]; 2] {
        &self.gc[usize::from(skip)]
    }
}

fn assign(columns: &[(&str, &str)]) -> String {
    columns.iter().map(|(column, value)| format!("{column}={value}")).collect::<Vec<_>>().join(",")
}

/// What `batch` makes its statements of: the same expressions, about what is asked as `r` and the locked rows as `l`.
#[derive(Debug)]
pub(super) struct Parts {
    pub(super) columns: String,
    pub(super) now: String,
    pub(super) take: String,
    pub(super) open: String,
    pub(super) seen: String,
    pub(super) change: String,
    pub(super) fence: String,
    pub(super) create: String,
}

/// Makes them.
pub(super) fn qualified(strict: bool) -> Parts {
    let fill = |text: &str| {
        let (claim, remember) = (CLAIM.as_millis().to_string(), REMEMBER.as_millis().to_string());
        let filled = [("{live}", LIVE), ("{free}", FREE), ("{stub}", STUB), ("{now}", NOW)];
        let filled = filled.iter().fold(text.to_owned(), |text, (name, value)| text.replace(name, value));
        filled.replace("{claim}", &claim).replace("{remember}", &remember)
    };
    let set = |columns: &[(&str, String)]| {
        columns.iter().map(|(column, value)| format!("t.{column}={}", over(&fill(value)))).collect::<Vec<_>>().join(",")
    };
    let of = |columns: &[(&'static str, &str)]| -> Vec<(&'static str, String)> {
        columns.iter().map(|(column, value)| (*column, (*value).to_owned())).collect()
    };
    let prolonged = "GREATEST(expires_at,{now}+2*:lease)";
    let mut take = vec![("expires_minute", format!("{prolonged} DIV 60000")), ("expires_at", prolonged.to_owned())];
    take.extend(of(&COME));
    take.extend(of(&TAKE));
    let mut change = vec![
        ("data", ":data".to_owned()),
        ("write_id", ":write".to_owned()),
        ("expires_minute", "({now}+:ttl) DIV 60000".to_owned()),
        ("expires_at", "{now}+:ttl".to_owned()),
    ];
    // Whoever keeps his lock, or has none, leaves it as it is.
    let given = |(column, value): &(&'static str, &str)| {
        (*column, format!("IF(:gives,{},{column})", value.replace("{clean}", "lock_token<=>:token")))
    };
    change.extend(RELEASE.iter().map(given));
    let lock = match strict {
        true => "IF(:excl,lock_token=:token AND lock_until>{now},{free})",
        false => "(:excl AND lock_token=:token OR {free})",
    };
    Parts {
        columns: over_columns(),
        now: fill(NOW),
        take: set(&take),
        open: over(&fill(&format!("{{live}} AND {}", OPEN.replace("{dead}", "")))),
        seen: fill(
            "lock_token IN ({tokens}),lock_handed,{live},IF(lock_token IN ({tokens}) AND {live},data,NULL),write_id,\
             expires_at-{now},data IS NOT NULL,lock_owner,lock_since,lock_until-{now},0,id,\
             {free} AND (want_token IS NULL OR want_until<={now})",
        ),
        change: set(&change),
        fence: over(&fill(&format!("write_id=:prev AND write_id<>:write AND {{live}} AND {lock}"))),
        create: "(id,data,write_id,expires_at,expires_minute,lock_token,lock_until,lock_since,lock_lease,lock_owner,lock_process)"
            .to_owned(),
    }
}

/// The columns that expressions read; of the bytes only whether there are any.
const READ: [&str; 13] = [
    "id",
    "write_id",
    "expires_at",
    "expires_minute",
    "lock_token",
    "lock_until",
    "lock_since",
    "lock_lease",
    "lock_owner",
    "lock_process",
    "lock_handed",
    "want_token",
    "want_until",
];

fn over_columns() -> String {
    format!("{},want_process,data IS NOT NULL AS filled", READ.join(","))
}

/// Turns an expression about the columns of a row, and what a statement is given, into one about `l` and `r`.
fn over(text: &str) -> String {
    let text = text.replace("data IS NOT NULL", "l.filled");
    let (mut over, mut rest) = (String::new(), &*text);
    while let Some(start) = rest.find(|c: char| c.is_ascii_alphabetic() || c == ':' || c == '\'') {
        let (before, word) = rest.split_at(start);
        over.push_str(before);
        let end = match word.strip_prefix('\'') {
            Some(literal) => literal.find('\'').map_or(word.len(), |end| end + 2),
            None => word[1..]
                .find(|c: char| !c.is_ascii_alphanumeric() && c != '_' && c != '.')
                .map_or(word.len(), |end| end + 1),
        };
        let (word, after) = word.split_at(end);
        match word {
            // Picked from a list, because a table with bytes of any length would be put on disk.
            ":data" => over.push_str("ELT(r.n,{data})"),
            ":write" => over.push_str("r.w"),
            // The same for all.
            ":owner" => over.push_str("{owner}"),
            ":alive" => over.push_str("{alive}"),
            word if word.starts_with(':') => over.extend(["r.", &word[1..]]),
            word if word == "want_process" || READ.contains(&word) => over.extend(["l.", word]),
            word => over.push_str(word),
        }
        rest = after;
    }
    over + rest
}
