package sandbox

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"os"
)

// act is the life of a command inside: it does what it is told and returns its exit code.
func act(what string, args []string) int {
	var err error
	switch what {
	case "send":
		err = actSend(args[0], args[1])
	case "cli":
		return actCLI(args)
	case "shell":
		err = actShell(args)
	case "count":
		err = actCount()
	case "attack":
		err = actAttack(args)
	case "dial":
		err = actDial(args)
	case "attack-queue":
		err = actAttackQueue()
	case "nested":
		report("nested ", nestedAttempts())
	default:
		err = fmt.Errorf("unknown act %q", what)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, what+":", err)
		return 1
	}
	return 0
}

// actSend sends one datagram.
func actSend(to, text string) error {
	c, err := net.Dial("udp", to)
	if err != nil {
		return err
	}
	defer c.Close()
	_, err = c.Write([]byte(text))
	return err
}

// testContext is for programs that have no test.
func testContext() context.Context { return context.Background() }

// testLogger is silent.
func testLogger() *slog.Logger { return slog.New(slog.DiscardHandler) }
