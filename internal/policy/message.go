package policy

import (
	"fmt"
	"strings"

	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/token"

	"github.com/wfpstack/wfpstack/layers"
)

// ErrFile is the sentinel of every mistake in a policy file.
var ErrFile = fmt.Errorf("bad policy file: %w", layers.ErrInvalid)

// Message says something about a place in a policy file.
type Message struct {
	// File is the file as it was named.
	File string
	// Line and Column begin at 1; 0 is the file as a whole. Units: columns in characters.
	Line, Column int
	// Text is the line, Width how many of its characters are meant.
	Text  string
	Width int
	// Problem says what is wrong, and the cure.
	Problem string
}

// String returns FILE:LINE:COLUMN: problem and, in two lines below it, the line with carets under what is meant.
func (m *Message) String() string {
	if m.Line == 0 {
		return printable(m.File) + ": " + m.Problem
	}
	at := byteOffset(m.Text, m.Column-1)
	n := byteOffset(m.Text[at:], m.Width)
	return fmt.Sprintf("%s:%d:%d: %s\n%s", printable(m.File), m.Line, m.Column, m.Problem, excerpt(m.Text, at, n, "  "))
}

// byteOffset is where the character with a number begins.
func byteOffset(s string, chars int) int {
	for i := range s {
		if chars <= 0 {
			return i
		}
		chars--
	}
	return len(s)
}

// Error is a mistake in a policy file. It wraps ErrFile, and ErrAsk where that is the mistake.
type Error struct {
	Message
	// Err is the sentinel.
	Err error
}

// Error returns the message.
func (e *Error) Error() string { return e.String() }

// Unwrap returns the sentinel.
func (e *Error) Unwrap() error { return e.Err }

// maxErrors is after how many mistakes a file is given up.
const maxErrors = 20

// span is a place in a file and its extent, in characters.
type span struct{ line, column, width int }

// spanOf is where a node stands: of a scalar its text, of a list or mapping its first character.
func spanOf(n ast.Node) span {
	if n == nil {
		return span{}
	}
	if m, ok := n.(*ast.MappingNode); ok && !m.IsFlowStyle && len(m.Values) > 0 {
		return spanOf(m.Values[0].Key) // the token of a block mapping is its first colon
	}
	if m, ok := n.(*ast.MappingValueNode); ok {
		return spanOf(m.Key)
	}
	tk := n.GetToken()
	if tk == nil || tk.Position == nil {
		return span{}
	}
	return span{tk.Position.Line, tk.Position.Column, widthOf(tk)}
}

func widthOf(tk *token.Token) int {
	text, _, _ := strings.Cut(strings.TrimSpace(tk.Origin), "\n")
	return max(1, len([]rune(strings.TrimSpace(text))))
}

// message makes a message about a place.
func (p *fileParser) message(at span, problem string) Message {
	m := Message{File: p.name, Line: at.line, Column: at.column, Width: at.width, Problem: problem}
	if at.line >= 1 && at.line <= len(p.lines) {
		m.Text = strings.TrimSuffix(p.lines[at.line-1], "\r")
	}
	return m
}

// fail notes a mistake.
func (p *fileParser) fail(at span, format string, args ...any) {
	p.failWith(ErrFile, at, fmt.Sprintf(format, args...))
}

func (p *fileParser) failWith(err error, at span, problem string) {
	if len(p.errs) < maxErrors {
		p.errs = append(p.errs, &Error{p.message(at, problem), err})
	}
}

// warn notes what is allowed and probably not meant.
func (p *fileParser) warn(at span, format string, args ...any) {
	p.policy.Warnings = append(p.policy.Warnings, p.message(at, fmt.Sprintf(format, args...)))
}
