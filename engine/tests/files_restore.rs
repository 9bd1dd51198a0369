//! Descriptors of a live process are saved, and made again in a fresh task.

mod files_support;

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use ferry_engine::files::{FilesOptions, Inherited, RestoreFilesError};
use ferry_engine::sys::kcmp;
use files_support::{Holder, Scratch, Tasks, images, plan, raw};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::{dup, read};
use rustix::pipe::{PipeFlags, fcntl_getpipe_size, fcntl_setpipe_size, pipe_with};
use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create};

const CLOEXEC: u32 = libc::O_CLOEXEC as u32;

#[test]
fn files_pipes_and_events_come_back() {
    let scratch = Scratch::new("objects");
    let mut file =
        OpenOptions::new().read(true).write(true).create(true).truncate(true).open(scratch.path("a")).unwrap();
    file.write_all(b"hello world").unwrap();
    file.seek(SeekFrom::Start(6)).unwrap();
    let log = OpenOptions::new().append(true).create(true).open(scratch.path("log")).unwrap();
    let directory = File::open(&scratch.0).unwrap();
    let only_path = OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(scratch.path("a")).unwrap();
    let full = File::open("/dev/full").unwrap();
    let (read_end, write_end) = pipe_with(PipeFlags::CLOEXEC).unwrap();
    fcntl_setpipe_size(&read_end, 8192).unwrap();
    let content: Vec<u8> = (0..6000u32).map(|i| (i % 251) as u8).collect();
    rustix::io::write(&write_end, &content).unwrap();
    rustix::fs::fcntl_setfl(&write_end, OFlags::NONBLOCK).unwrap();
    let counter = eventfd(3, EventfdFlags::SEMAPHORE | EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).unwrap();
    let timer = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::CLOEXEC).unwrap();
    let time =
        Itimerspec { it_value: Timespec { tv_sec: 1000, tv_nsec: 0 }, it_interval: Timespec { tv_sec: 7, tv_nsec: 5 } };
    rustix::time::timerfd_settime(&timer, TimerfdTimerFlags::empty(), &time).unwrap();
    let signals = nix::sys::signalfd::SignalFd::with_flags(
        &[nix::sys::signal::Signal::SIGUSR1].into_iter().collect(),
        nix::sys::signalfd::SfdFlags::SFD_CLOEXEC,
    )
    .unwrap();
    let twin = dup(&file).unwrap();
    let all = [
        file.as_fd(),
        log.as_fd(),
        directory.as_fd(),
        only_path.as_fd(),
        full.as_fd(),
        read_end.as_fd(),
        write_end.as_fd(),
        counter.as_fd(),
        timer.as_fd(),
        signals.as_fd(),
        twin.as_fd(),
    ];
    let holder = Holder::start(&all);
    let mut collector = holder.collect(FilesOptions::default());
    assert_eq!(collector.refusals(), []);
    let dump = collector.finish();
    assert_eq!(dump.fdinfo.len(), 1);
    assert_eq!(dump.fdinfo[0].1.len(), all.len() + 3);
    drop(holder);

    let mut images = images(&dump);
    // One descriptor is to be closed by execve(2).
    let mut entries = dump.fdinfo[0].1.clone();
    entries.iter_mut().find(|entry| entry.fd == raw(&log) as u32).unwrap().flags = 1;
    images.insert("fdinfo-2.img".into(), ferry_engine::images::encode(ferry_engine::images::Kind::Fdinfo, &entries));
    let tasks = Tasks::restore(&mut plan(&images, &[(None, 2)], Inherited::new()).unwrap(), &[]).unwrap();

    let mut expected: Vec<i32> = all.iter().map(AsRawFd::as_raw_fd).chain([0, 1, 2]).collect();
    expected.sort_unstable();
    assert_eq!(tasks.numbers(0), expected);
    assert_eq!(tasks.link(0, 0), "/dev/null");
    assert_eq!(tasks.info(0, raw(&file), "pos"), "6");
    assert_eq!(tasks.flags(0, raw(&file)) & 3, libc::O_RDWR as u32);
    let pid = tasks.pid(0);
    let same = |left, right| kcmp::compare(kcmp::Kind::File, (pid, left), (pid, right)).unwrap().is_eq();
    assert!(same(raw(&file) as u32, raw(&twin) as u32), "the duplicate shares its description");
    assert!(!same(raw(&file) as u32, raw(&only_path) as u32));
    let mut rest = String::new();
    File::from(tasks.descriptor(0, raw(&file))).read_to_string(&mut rest).unwrap();
    assert_eq!(rest, "world");
    let flags = tasks.flags(0, raw(&log));
    assert_eq!(flags & (libc::O_APPEND | libc::O_ACCMODE) as u32, (libc::O_APPEND | libc::O_WRONLY) as u32);
    assert_ne!(flags & CLOEXEC, 0);
    assert_eq!(tasks.flags(0, raw(&directory)) & CLOEXEC, 0);
    assert_eq!(tasks.link(0, raw(&directory)), scratch.0.to_string_lossy());
    assert_ne!(tasks.flags(0, raw(&only_path)) & libc::O_PATH as u32, 0);
    assert_eq!(tasks.link(0, raw(&full)), "/dev/full");

    let end = tasks.descriptor(0, raw(&read_end));
    assert_eq!(fcntl_getpipe_size(&end).unwrap(), 8192);
    let mut bytes = vec![0; 8192];
    let got = read(&end, &mut bytes).unwrap();
    assert_eq!(bytes[..got], content);
    assert_ne!(tasks.flags(0, raw(&write_end)) & libc::O_NONBLOCK as u32, 0);
    assert_eq!(tasks.flags(0, raw(&read_end)) & libc::O_NONBLOCK as u32, 0);
    rustix::io::write(tasks.descriptor(0, raw(&write_end)), b"more").unwrap();
    assert_eq!(read(&end, &mut bytes).unwrap(), 4, "both ends are of one pipe");

    let counter = tasks.descriptor(0, raw(&counter));
    let mut word = [0; 8];
    for _ in 0..3 {
        assert_eq!(read(&counter, &mut word), Ok(8));
        assert_eq!(u64::from_ne_bytes(word), 1, "a semaphore gives one at a time");
    }
    assert_eq!(read(&counter, &mut word), Err(rustix::io::Errno::AGAIN));
    let left = rustix::time::timerfd_gettime(tasks.descriptor(0, raw(&timer))).unwrap();
    assert!((990..=1000).contains(&left.it_value.tv_sec), "{left:?}");
    assert_eq!((left.it_interval.tv_sec, left.it_interval.tv_nsec), (7, 5));
    assert_eq!(tasks.info(0, raw(&signals), "sigmask"), "0000000000000200");
}

#[test]
fn deleted_files_and_fifos_come_back() {
    let scratch = Scratch::new("deleted");
    let mut deleted = OpenOptions::new().read(true).write(true).create_new(true).open(scratch.path("gone")).unwrap();
    deleted.write_all(b"still here").unwrap();
    let again = File::open(scratch.path("gone")).unwrap();
    let sparse = OpenOptions::new().read(true).write(true).create_new(true).open(scratch.path("sparse")).unwrap();
    sparse.set_len(64 << 20).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&sparse, b"middle", 32 << 20).unwrap();
    std::fs::remove_file(scratch.path("gone")).unwrap();
    std::fs::remove_file(scratch.path("sparse")).unwrap();
    // Another file took the name meanwhile.
    std::fs::write(scratch.path("gone"), b"another").unwrap();
    let fifo_path = scratch.path("fifo");
    rustix::fs::mknodat(rustix::fs::CWD, &fifo_path, FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
    let reader: OwnedFd = rustix::fs::open(&fifo_path, OFlags::RDONLY | OFlags::NONBLOCK, Mode::empty()).unwrap();
    let writer: OwnedFd = rustix::fs::open(&fifo_path, OFlags::WRONLY, Mode::empty()).unwrap();
    rustix::io::write(&writer, b"queued").unwrap();

    let holder = Holder::start(&[deleted.as_fd(), again.as_fd(), sparse.as_fd(), reader.as_fd(), writer.as_fd()]);
    let mut collector = holder.collect(FilesOptions::default());
    assert_eq!(collector.refusals(), []);
    let dump = collector.finish();
    let ghosts = dump.images.iter().filter(|(name, _)| name.starts_with("ghost-file-")).count();
    assert_eq!(ghosts, 2, "one image for each inode");
    let (numbers, inode) = ([raw(&deleted), raw(&again), raw(&sparse)], rustix::fs::fstat(&deleted).unwrap().st_ino);
    drop((holder, deleted, again));

    let mut plan = plan(&images(&dump), &[(None, 2)], Inherited::new()).unwrap();
    let tasks = Tasks::restore(&mut plan, &[]).unwrap();
    let first = tasks.descriptor(0, numbers[0]);
    let mut content = String::new();
    File::from(tasks.descriptor(0, numbers[1])).read_to_string(&mut content).unwrap();
    assert_eq!(content, "still here");
    let stat = rustix::fs::fstat(&first).unwrap();
    assert_eq!(stat.st_nlink, 0);
    assert_eq!(stat.st_ino, rustix::fs::fstat(tasks.descriptor(0, numbers[1])).unwrap().st_ino);
    let _ = inode;
    assert_eq!(tasks.link(0, numbers[2]), format!("{} (deleted)", scratch.path("sparse")));
    let sparse = File::from(tasks.descriptor(0, numbers[2]));
    let stat = rustix::fs::fstat(&sparse).unwrap();
    assert_eq!(stat.st_size, 64 << 20);
    assert!(stat.st_blocks * 512 < 1 << 20, "holes stay holes");
    let mut middle = [0; 8];
    std::os::unix::fs::FileExt::read_exact_at(&sparse, &mut middle, (32 << 20) - 1).unwrap();
    assert_eq!(&middle, b"\0middle\0");
    let mut names: Vec<String> =
        std::fs::read_dir(&scratch.0).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort_unstable();
    assert_eq!(names, ["fifo", "gone"]);
    assert_eq!(std::fs::read(scratch.path("gone")).unwrap(), b"another");

    drop((reader, writer));
    let mut bytes = [0; 16];
    let fifo = tasks.numbers(0).into_iter().find(|fd| tasks.link(0, *fd) == fifo_path).expect("the FIFO");
    assert_ne!(tasks.flags(0, fifo) & libc::O_NONBLOCK as u32, 0);
    let fifo = tasks.descriptor(0, fifo);
    assert_eq!(read(&fifo, &mut bytes), Ok(6 + 6), "both this test's FIFO, alive until now, and the image filled it");
}

#[test]
fn relatives_share_what_they_shared() {
    let scratch = Scratch::new("shared");
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(scratch.path("a")).unwrap();
    let (read_end, write_end) = pipe_with(PipeFlags::CLOEXEC).unwrap();
    // Three processes: the second has the pipe's one end, the third the other and the file too.
    let holders = [
        Holder::start(&[file.as_fd()]),
        Holder::start(&[read_end.as_fd()]),
        Holder::start(&[file.as_fd(), write_end.as_fd()]),
    ];
    let mut collector =
        ferry_engine::files::FilesCollector::new(holders[0].pid(), FilesOptions::default()).expect("a collector");
    let tables: Vec<u32> = holders.iter().map(|holder| collector.add_task(holder.task())).collect();
    assert_eq!(tables, [2, 3, 4]);
    assert_eq!(collector.refusals(), []);
    let dump = collector.finish();
    drop(holders);

    let parents = [(None, 2), (Some(0), 3), (Some(0), 4)];
    let mut plan = plan(&images(&dump), &parents, Inherited::new()).unwrap();
    let tasks = Tasks::restore(&mut plan, &[0, 0]).unwrap();
    for (task, own) in [vec![raw(&file)], vec![raw(&read_end)], vec![raw(&file), raw(&write_end)]].iter().enumerate() {
        let mut expected = [&[0, 1, 2], &own[..]].concat();
        expected.sort_unstable();
        assert_eq!(tasks.numbers(task), expected);
    }
    let fd = raw(&file) as u32;
    assert!(kcmp::compare(kcmp::Kind::File, (tasks.pid(0), fd), (tasks.pid(2), fd)).unwrap().is_eq());
    rustix::io::write(tasks.descriptor(2, raw(&write_end)), b"through").unwrap();
    let mut bytes = [0; 16];
    assert_eq!(read(tasks.descriptor(1, raw(&read_end)), &mut bytes), Ok(7));
    assert!(kcmp::compare(kcmp::Kind::File, (tasks.pid(0), 1), (tasks.pid(2), 1)).unwrap().is_ne());
}

#[test]
fn a_table_without_gaps_leaves_room_to_make_its_last_descriptor() {
    let scratch = Scratch::new("dense");
    let path = scratch.path("fifo");
    rustix::fs::mknodat(rustix::fs::CWD, &path, FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
    // Numbers 0, 1, 2 and 3; the FIFO takes two at a time to open.
    let fifo = rustix::fs::open(&path, OFlags::RDWR, Mode::empty()).unwrap();
    let entries = |dump: &ferry_engine::files::FilesDump, highest: u32| {
        let mut entries = dump.fdinfo[0].1.clone();
        entries.iter_mut().filter(|entry| entry.fd > 2).for_each(|entry| entry.fd = 3);
        entries.retain(|entry| entry.fd <= highest);
        ferry_engine::images::encode(ferry_engine::images::Kind::Fdinfo, &entries)
    };
    let holders = [Holder::start(&[fifo.as_fd()]), Holder::start(&[])];
    let mut collector = ferry_engine::files::FilesCollector::new(holders[0].pid(), FilesOptions::default()).unwrap();
    let tables = holders.each_ref().map(|holder| collector.add_task(holder.task()));
    assert_eq!(tables, [2, 3]);
    let dump = collector.finish();
    let mut images = images(&dump);
    images.insert("fdinfo-2.img".into(), entries(&dump, 3));
    // The other process has what the first has at 0 to 2, so that these wait above to be placed.
    images.insert("fdinfo-3.img".into(), entries(&dump, 2));
    let mut plan = plan(&images, &[(None, 2), (Some(0), 3)], Inherited::new()).unwrap();
    let tasks = Tasks::restore(&mut plan, &[0]).unwrap();
    assert_eq!(tasks.numbers(0), [0, 1, 2, 3]);
    assert_eq!(tasks.numbers(1), [0, 1, 2]);
    assert_eq!(tasks.link(0, 3), path);
}

#[test]
fn changed_and_missing_files_are_named() {
    let scratch = Scratch::new("changed");
    std::fs::write(scratch.path("grown"), b"1").unwrap();
    std::fs::write(scratch.path("lost"), b"1").unwrap();
    let (grown, lost) = (File::open(scratch.path("grown")).unwrap(), File::open(scratch.path("lost")).unwrap());
    let holder = Holder::start(&[grown.as_fd(), lost.as_fd()]);
    let dump = holder.collect(FilesOptions::default()).finish();
    drop(holder);
    std::fs::write(scratch.path("grown"), b"12").unwrap();
    let mut first = plan(&images(&dump), &[(None, 2)], Inherited::new()).unwrap();
    let error = Tasks::restore(&mut first, &[]).err().expect("an error");
    assert!(matches!(error, RestoreFilesError::Changed { .. }), "{error}");
    let text = error.to_string();
    assert!(text.contains(&scratch.path("grown")) && text.contains("2 bytes now and had 1"), "{text}");

    std::fs::remove_file(scratch.path("lost")).unwrap();
    let root = File::open("/").unwrap();
    let obstacles = first.check(root.as_fd(), &|_| true);
    let texts: Vec<String> = obstacles.iter().map(ToString::to_string).collect();
    assert_eq!(texts.len(), 2, "{texts:?}");
    assert!(texts.iter().any(|text| text.contains(&scratch.path("lost")) && text.contains("missing")), "{texts:?}");

    std::fs::write(scratch.path("grown"), b"1").unwrap();
    let mut second = plan(&images(&dump), &[(None, 2)], Inherited::new()).unwrap();
    let error = Tasks::restore(&mut second, &[]).err().expect("an error").to_string();
    assert!(error.contains(&scratch.path("lost")) && error.contains("open it") && error.contains("ENOENT"), "{error}");
}

#[test]
fn locks_and_signal_owners_come_back() {
    use nix::fcntl::{Flock, FlockArg};
    let scratch = Scratch::new("locks");
    let open = |name: &str| {
        OpenOptions::new().read(true).write(true).create(true).truncate(true).open(scratch.path(name)).unwrap()
    };
    let flocked = Flock::lock(open("flocked"), FlockArg::LockExclusive).unwrap();
    let ranged = open("ranged");
    let range = libc::flock { l_type: libc::F_WRLCK as i16, l_whence: 0, l_start: 100, l_len: 10, l_pid: 0 };
    nix::fcntl::fcntl(&ranged, nix::fcntl::FcntlArg::F_OFD_SETLK(&range)).unwrap();
    let (owned, _other) = rustix::net::socketpair(
        rustix::net::AddressFamily::UNIX,
        rustix::net::SocketType::STREAM,
        rustix::net::SocketFlags::CLOEXEC,
        None,
    )
    .unwrap();
    set_owner(&owned, std::process::id() as i32);
    let holder = Holder::start(&[flocked.as_fd(), ranged.as_fd(), owned.as_fd(), _other.as_fd()]);
    let mut refusing = holder.collect(FilesOptions::default());
    let refusals: Vec<String> = refusing.refusals().iter().map(ToString::to_string).collect();
    assert_eq!(refusals.len(), 2, "{refusals:?}");
    assert!(refusals.iter().all(|refusal| refusal.contains("file lock") && refusal.contains("--file-locks")));
    let mut collector = holder.collect(FilesOptions { file_locks: true, ..FilesOptions::default() });
    assert_eq!(collector.refusals(), []);
    let dump = collector.finish();
    drop(holder);
    let numbers = [raw(&*flocked), raw(&ranged), raw(&owned)];
    let mut images = images(&dump);
    // The plan's task has another pid than the sleeper had.
    let kind = ferry_engine::images::Kind::FileLocks;
    let mut locks: Vec<ferry_engine::images::file_lock::FileLockEntry> =
        ferry_engine::images::decode_all("filelocks.img", kind, &images["filelocks.img"]).unwrap();
    assert_eq!(locks.len(), 2);
    locks.iter_mut().for_each(|lock| lock.pid = 1);
    images.insert("filelocks.img".into(), ferry_engine::images::encode(kind, &locks));
    let mut early = plan(&images, &[(None, 2)], Inherited::new()).unwrap();
    // The locks are this process's still.
    let error = Tasks::restore(&mut early, &[]).err().expect("the locks are taken").to_string();
    assert!(error.contains("take its file lock again"), "{error}");
    drop((flocked, ranged));
    let mut plan = plan(&images, &[(None, 2)], Inherited::new()).unwrap();
    let tasks = Tasks::restore(&mut plan, &[]).unwrap();
    assert!(tasks.info(0, numbers[0], "lock").contains("FLOCK  ADVISORY  WRITE"));
    let range = tasks.info(0, numbers[1], "lock");
    assert!(range.contains("OFDLCK ADVISORY  WRITE") && range.ends_with(" 100 109"), "{range}");
    let owner = ferry_engine::sys::owner::get(tasks.descriptor(0, numbers[2]).as_fd()).unwrap();
    assert_eq!((owner.pid, owner.kind, owner.signal), (std::process::id() as i32, 1, libc::SIGURG));
    assert_ne!(tasks.flags(0, numbers[2]) & libc::O_ASYNC as u32, 0);
}

/// Has SIGURG, which is ignored, sent to `pid` when the descriptor becomes ready.
#[allow(unsafe_code)]
fn set_owner(fd: &OwnedFd, pid: i32) {
    let fd = fd.as_raw_fd();
    // SAFETY: these commands take numbers.
    let results = unsafe {
        [
            libc::fcntl(fd, libc::F_SETOWN, pid),
            libc::fcntl(fd, ferry_engine::sys::owner::F_SETSIG, libc::SIGURG),
            libc::fcntl(fd, libc::F_SETFL, libc::O_ASYNC),
        ]
    };
    assert_eq!(results, [0; 3]);
}

#[test]
fn an_epoll_instance_watches_what_it_watched() {
    use rustix::event::epoll;
    let instance = epoll::create(epoll::CreateFlags::CLOEXEC).unwrap();
    let ready = eventfd(1, EventfdFlags::CLOEXEC).unwrap();
    let idle = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    let closed = dup(&idle).unwrap();
    epoll::add(
        &instance,
        &ready,
        epoll::EventData::new_u64(u64::MAX - 7),
        epoll::EventFlags::IN | epoll::EventFlags::ET,
    )
    .unwrap();
    epoll::add(&instance, &closed, epoll::EventData::new_u64(9), epoll::EventFlags::IN).unwrap();
    // The number that the second was added with is another's by now.
    drop(closed);
    let other = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    let holder = Holder::start(&[instance.as_fd(), ready.as_fd(), idle.as_fd(), other.as_fd()]);
    let mut collector = holder.collect(FilesOptions::default());
    assert_eq!(collector.refusals(), []);
    let dump = collector.finish();
    drop(holder);
    let tasks = Tasks::restore(&mut plan(&images(&dump), &[(None, 2)], Inherited::new()).unwrap(), &[]).unwrap();
    let restored = tasks.descriptor(0, raw(&instance));
    let mut events = Vec::with_capacity(8);
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    let wait = |events: &mut Vec<epoll::Event>| {
        events.clear();
        epoll::wait(&restored, rustix::buffer::spare_capacity(events), Some(&now)).unwrap();
        events.iter().map(|event| event.data.u64()).collect::<Vec<_>>()
    };
    assert_eq!(wait(&mut events), [u64::MAX - 7]);
    assert!(wait(&mut events).is_empty(), "it is edge-triggered");
    rustix::io::write(tasks.descriptor(0, raw(&idle)), &1u64.to_ne_bytes()).unwrap();
    assert_eq!(wait(&mut events), [9]);
}

#[test]
fn an_inherited_pipe_takes_the_place_of_the_one_left_behind() {
    let (read_end, write_end) = pipe_with(PipeFlags::CLOEXEC).unwrap();
    let holder = Holder::start(&[write_end.as_fd()]);
    let mut collector = holder.collect(FilesOptions::default());
    let refusals = collector.refusals();
    assert_eq!(refusals.len(), 1, "{refusals:?}");
    assert!(refusals[0].to_string().contains("outside the tree"), "{}", refusals[0]);
    let inode = rustix::fs::fstat(&read_end).unwrap().st_ino;
    let options = FilesOptions { external: [format!("pipe[{inode}]")].into(), ..FilesOptions::default() };
    let mut collector = holder.collect(options);
    assert_eq!(collector.refusals(), []);
    let dump = collector.finish();
    drop(holder);
    let number = raw(&write_end);
    drop((read_end, write_end));

    let (read_end, write_end) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).unwrap();
    let inherited = Inherited::from([(format!("pipe:[{inode}]"), write_end)]);
    let mut plan = plan(&images(&dump), &[(None, 2)], inherited).unwrap();
    let tasks = Tasks::restore(&mut plan, &[]).unwrap();
    assert_eq!(tasks.numbers(0), [0, 1, 2, number]);
    assert_eq!(tasks.flags(0, number) & libc::O_NONBLOCK as u32, 0, "its flags are its own");
    rustix::io::write(tasks.descriptor(0, number), b"hello").unwrap();
    let mut bytes = [0; 16];
    assert_eq!(read(&read_end, &mut bytes), Ok(5));
}

#[test]
fn thousands_of_descriptors_take_little_time() {
    let scratch = Scratch::new("many");
    rustix::process::setrlimit(
        rustix::process::Resource::Nofile,
        rustix::process::Rlimit {
            current: Some(9000),
            ..rustix::process::getrlimit(rustix::process::Resource::Nofile)
        },
    )
    .unwrap();
    let mut descriptors: Vec<OwnedFd> = Vec::new();
    while descriptors.len() < 4000 {
        let path = scratch.path(&descriptors.len().to_string());
        descriptors
            .push(OpenOptions::new().read(true).write(true).create(true).truncate(true).open(path).unwrap().into());
        let (read_end, write_end) = pipe_with(PipeFlags::CLOEXEC).unwrap();
        rustix::io::write(&write_end, b"x").unwrap();
        descriptors.extend([read_end, write_end]);
        descriptors.push(eventfd(1, EventfdFlags::CLOEXEC).unwrap());
    }
    let borrowed: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
    let holder = Holder::start(&borrowed);
    let start = std::time::Instant::now();
    let mut collector = holder.collect(FilesOptions::default());
    let took = start.elapsed();
    assert_eq!(collector.refusals(), []);
    let dump = collector.finish();
    assert_eq!(dump.fdinfo[0].1.len(), descriptors.len() + 3);
    let numbers: Vec<i32> = descriptors.iter().map(raw).collect();
    drop(holder);
    drop(descriptors);
    let mut plan = plan(&images(&dump), &[(None, 2)], Inherited::new()).unwrap();
    let tasks = Tasks::restore(&mut plan, &[]).unwrap();
    let mut expected = [&[0, 1, 2], &numbers[..]].concat();
    expected.sort_unstable();
    assert_eq!(tasks.numbers(0), expected);
    // Generous: an unoptimised build on a busy machine.
    assert!(took < std::time::Duration::from_secs(1), "{took:?}");
}
