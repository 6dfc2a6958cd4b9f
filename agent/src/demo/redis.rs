//! A client for stock guests with a redis server: numbered keys over one TCP connection, checked at the end.

use std::io::{self, BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::end::End;

/// Between two requests.
const PAUSE: Duration = Duration::from_millis(5);
/// A request unanswered for so long means that the connection is dead.
const PATIENCE: Duration = Duration::from_secs(240);

#[derive(Debug, Default)]
struct Book {
    /// Numbers acknowledged with `+OK`, ascending.
    acked: u64,
    replies: Vec<Instant>,
    errors: Vec<String>,
    broken: u64,
}

/// The client, on a thread of its own.
#[derive(Debug)]
pub struct RedisClient {
    stop: Arc<AtomicBool>,
    book: Arc<Mutex<Book>>,
    thread: Option<JoinHandle<io::Result<Connection>>>,
}

#[derive(Debug)]
struct Connection {
    reader: BufReader<TcpStream>,
    writer: TcpStream,
}

impl Connection {
    fn open(addr: SocketAddr, within: Duration) -> io::Result<Self> {
        let deadline = Instant::now() + within;
        loop {
            match Self::try_open(addr) {
                Ok(connection) => return Ok(connection),
                Err(e) if Instant::now() > deadline => return Err(e),
                Err(_) => std::thread::sleep(Duration::from_millis(100)),
            }
        }
    }

    fn try_open(addr: SocketAddr) -> io::Result<Self> {
        let writer = TcpStream::connect_timeout(&addr, Duration::from_secs(2))?;
        writer.set_nodelay(true)?;
        writer.set_read_timeout(Some(Duration::from_secs(2)))?;
        let mut connection = Self {
            reader: BufReader::new(writer.try_clone()?),
            writer,
        };
        connection.ask(&["PING"])?;
        connection.writer.set_read_timeout(Some(PATIENCE))?;
        Ok(connection)
    }

    /// One request (RESP array of bulk strings) and its one-line or bulk answer.
    fn ask(&mut self, words: &[&str]) -> io::Result<Option<String>> {
        let mut request = format!("*{}\r\n", words.len());
        for word in words {
            request += &format!("${}\r\n{word}\r\n", word.len());
        }
        self.writer.write_all(request.as_bytes())?;
        let line = self.line()?;
        match line.split_at_checked(1) {
            Some(("+" | ":", text)) => Ok(Some(text.to_string())),
            Some(("$", "-1")) => Ok(None),
            Some(("$", _)) => self.line().map(Some),
            _ => Err(io::Error::other(format!("redis answered {line:?}"))),
        }
    }

    fn line(&mut self) -> io::Result<String> {
        let mut line = String::new();
        if self.reader.read_line(&mut line)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(line.trim_end().to_string())
    }
}

fn key(n: u64) -> String {
    format!("understudy:{n}")
}

impl RedisClient {
    /// Connects within `within` and begins to write numbered keys.
    ///
    /// # Errors
    /// When no redis answers.
    pub fn start(addr: SocketAddr, within: Duration) -> io::Result<Self> {
        let mut connection = Connection::open(addr, within)?;
        let (stop, book) = (
            Arc::new(AtomicBool::new(false)),
            Arc::new(Mutex::new(Book::default())),
        );
        let (stopping, writing) = (stop.clone(), book.clone());
        let thread = std::thread::Builder::new()
            .name("redis-client".into())
            .spawn(move || {
                let mut n = 0;
                while !stopping.load(Ordering::Relaxed) {
                    n += 1;
                    match connection.ask(&["SET", &key(n), &n.to_string()]) {
                        Ok(_) => {
                            let mut book = lock(&writing);
                            book.acked = n;
                            book.replies.push(Instant::now());
                        }
                        Err(e) => {
                            let mut book = lock(&writing);
                            book.broken += 1;
                            book.errors.push(e.to_string());
                            return Err(e);
                        }
                    }
                    std::thread::sleep(PAUSE);
                }
                Ok(connection)
            })?;
        Ok(Self {
            stop,
            book,
            thread: Some(thread),
        })
    }

    /// Acknowledged writes.
    #[must_use]
    pub fn acked(&self) -> u64 {
        lock(&self.book).acked
    }

    /// The first acknowledgement after `t`.
    #[must_use]
    pub fn first_reply_after(&self, t: Instant) -> Option<Instant> {
        lock(&self.book).replies.iter().copied().find(|at| *at > t)
    }

    /// What went wrong.
    #[must_use]
    pub fn errors(&self) -> Vec<String> {
        lock(&self.book).errors.clone()
    }

    /// Stops writing and reads back, over the same connection, everything that was acknowledged.
    #[must_use]
    pub fn stop(mut self) -> End {
        self.stop.store(true, Ordering::Relaxed);
        let connection = self
            .thread
            .take()
            .and_then(|t| t.join().ok())
            .and_then(Result::ok);
        let book = lock(&self.book);
        let mut end = End {
            acked: book.acked,
            broken: book.broken,
            errors: book.errors.clone(),
            ..End::default()
        };
        if let Some(mut connection) = connection {
            end.verified = true;
            for n in 1..=book.acked {
                match connection.ask(&["GET", &key(n)]) {
                    Ok(Some(value)) if value == n.to_string() => {}
                    Ok(other) => {
                        end.lost += 1;
                        if end.errors.len() < 5 {
                            end.errors.push(format!("key {n} holds {other:?}"));
                        }
                    }
                    Err(e) => {
                        end.verified = false;
                        end.errors.push(e.to_string());
                        break;
                    }
                }
            }
        }
        end.survived = end.verified && end.lost == 0 && end.broken == 0;
        end
    }
}

fn lock(book: &Mutex<Book>) -> MutexGuard<'_, Book> {
    book.lock().unwrap_or_else(PoisonError::into_inner)
}
