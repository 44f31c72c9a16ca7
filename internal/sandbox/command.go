package sandbox

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// commandThread is the thread from which the command is forked. Capabilities, no_new_privs, Landlock and seccomp belong
// to a thread: this one gives them up for good, the rest of init keeps what it needs, and the command needs no program
// in between.
type commandThread struct {
	// ready gets one value when the thread is what the command is to be.
	ready chan restricted
	// release makes it fork; the answer comes through started.
	release chan struct{}
	started chan startResult
}

// restricted says how giving up went.
type restricted struct {
	warnings []string
	err      error
}

// startResult says how starting the command went.
type startResult struct {
	pid     int
	failure *failure
}

// startCommandThread makes the thread and returns at once.
func startCommandThread(s *spec) *commandThread {
	t := &commandThread{
		// One value each: the thread never waits to say it.
		ready:   make(chan restricted, 1),
		release: make(chan struct{}),
		started: make(chan startResult, 1),
	}
	// Owner: init. It ends after the fork; a process that is never released ends with it.
	go func() {
		// Never unlocked: the runtime ends a thread whose goroutine ends locked, and nobody else runs on it.
		runtime.LockOSThread()
		warnings, err := restrictThread()
		t.ready <- restricted{warnings, err}
		if err != nil {
			return
		}
		<-t.release
		pid, f := forkCommand(s)
		t.started <- startResult{pid, f}
	}()
	return t
}

// start forks the command and returns its number, or why there is none.
func (t *commandThread) start() (int, *failure) {
	close(t.release)
	r := <-t.started
	return r.pid, r.failure
}

// forkCommand starts the command from the calling thread, which is restricted.
func forkCommand(s *spec) (int, *failure) {
	op := "start " + s.Command[0]
	if s.Dir != "" {
		if err := unix.Chdir(s.Dir); err != nil {
			return 0, failed(failSetup, "change to folder "+s.Dir, err)
		}
	}
	path, err := lookUp(s.Command[0], envValue(s.Env, "PATH"))
	if err != nil {
		return 0, failed(kindOf(err), op, err)
	}
	// The fork gives the child this thread's signal mask, which nobody else uses.
	if _, err := threadMask(s.Mask); err != nil {
		return 0, failed(failSetup, op, err)
	}
	pid, err := forkExec(path, s)
	if err != nil {
		return 0, failed(execKind(path, err), op, err)
	}
	return pid, nil
}

// forkExec starts the file at path, or a shell with it where the kernel does not know its format, as execvp does for
// scripts without a first line that names their interpreter.
func forkExec(path string, s *spec) (int, error) {
	attr := &syscall.ProcAttr{Env: s.Env, Files: commandFiles(s.Inherited)}
	pid, err := syscall.ForkExec(path, s.Command, attr)
	if err == unix.ENOEXEC {
		argv := append([]string{"sh", path}, s.Command[1:]...)
		if pid, shErr := syscall.ForkExec("/bin/sh", argv, attr); shErr == nil {
			return pid, nil
		}
	}
	return pid, err
}

// commandFiles returns the descriptors of the command by number: the standard ones, and those inherited from the caller.
func commandFiles(inherited []inheritedFile) []uintptr {
	files := []uintptr{0, 1, 2}
	for _, f := range inherited {
		for len(files) < f.Number {
			files = append(files, ^uintptr(0)) // closed
		}
		files = append(files, uintptr(f.At))
	}
	return files
}

// errMode says that a file is there and we may not execute it.
var errMode = fmt.Errorf("may not be executed by this user: %w", unix.EACCES)

// errDirectory says that a command is a folder.
var errDirectory = fmt.Errorf("is a folder: %w", unix.EISDIR)

// lookUp returns the file that name means, as execvp does: a name with a slash is itself, any other is looked for in
// path. The calling thread's rights count.
//
// Errors: fs.ErrNotExist if there is none; the reason why it cannot be executed if there is.
func lookUp(name, path string) (string, error) {
	if strings.Contains(name, "/") {
		return name, executable(name)
	}
	if path == "" {
		path = "/usr/local/bin:/usr/bin:/bin"
	}
	found := error(unix.ENOENT)
	for _, dir := range filepath.SplitList(path) {
		if dir == "" {
			dir = "."
		}
		file := filepath.Join(dir, name)
		if !strings.Contains(file, "/") {
			file = "./" + file
		}
		err := executable(file)
		if err == nil {
			return file, nil
		}
		// A file that we may not run is an answer if there is no better one; folders, and what lies in folders that we
		// may not enter, are none.
		if errors.Is(err, errMode) {
			found = fmt.Errorf("%s: %w", file, err)
		}
	}
	return "", found
}

// executable returns nil if the calling thread may execute the file.
func executable(file string) error {
	var st unix.Stat_t
	if err := unix.Stat(file, &st); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT == unix.S_IFDIR {
		return errDirectory
	}
	if unix.Access(file, unix.X_OK) != nil {
		return errMode
	}
	return nil
}

// kindOf returns what it means that a command could not be looked up.
func kindOf(err error) failureKind {
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ENOTDIR) {
		return failNotFound
	}
	return failNotExecutable
}

// execKind returns what it means that execve of an existing file failed. ENOENT is its interpreter's.
func execKind(path string, err error) failureKind {
	if errors.Is(err, os.ErrNotExist) {
		if _, statErr := os.Stat(path); statErr != nil {
			return failNotFound
		}
	}
	return failNotExecutable
}

// closeStandardFiles lets go of what belongs to the command: who reads its output sees the end when the last process
// that has it ends, and not when we do.
func closeStandardFiles(inherited []inheritedFile) {
	null, err := unix.Open("/dev/null", unix.O_RDWR|unix.O_CLOEXEC, 0)
	for fd := range 3 {
		if err != nil {
			_ = unix.Close(fd)
			continue
		}
		_ = unix.Dup3(null, fd, 0)
	}
	if err == nil {
		_ = unix.Close(null)
	}
	for _, f := range inherited {
		_ = unix.Close(f.At)
	}
}
