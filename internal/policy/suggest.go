package policy

import (
	"fmt"
	"strings"
	"unicode"
)

// unknown says that a word is not known, which was probably meant, and what there is.
func unknown(what, word string, known []string) string {
	word = printable(word)
	s := fmt.Sprintf("unknown %s %q", what, word)
	if best := nearest(word, known); best != "" {
		s += fmt.Sprintf(" (did you mean %q?)", best)
	}
	if len(known) <= 16 {
		s += "; known are " + strings.Join(known, ", ")
	}
	return s
}

// nearest is the known word that was probably meant, "" if none is near.
func nearest(word string, known []string) string {
	if len(word) > 64 {
		return ""
	}
	word = strings.ToLower(word)
	best, least := "", len(word)/3+2
	for _, k := range known {
		if d := distance(word, k); d < least && d < len(k) {
			best, least = k, d
		}
	}
	return best
}

// distance is the number of letters to insert, delete, change, or swap with their neighbour.
func distance(a, b string) int {
	before, row := make([]int, len(b)+1), make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		next := make([]int, len(b)+1)
		next[0] = i + 1
		for j := range len(b) {
			cost := 1
			if a[i] == b[j] {
				cost = 0
			}
			next[j+1] = min(row[j]+cost, row[j+1]+1, next[j]+1)
			if i > 0 && j > 0 && a[i] == b[j-1] && a[i-1] == b[j] {
				next[j+1] = min(next[j+1], before[j-1]+1)
			}
		}
		before, row = row, next
	}
	return row[len(b)]
}

// printable replaces what would move the cursor or colour the terminal; one rune stays one rune, so that carets stay in place.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f || r >= 0x80 && r < 0xa0 || !unicode.IsGraphic(r) {
			return '?'
		}
		return r
	}, s)
}

// excerptWidth is how much of a long line an excerpt shows. Units: runes.
const excerptWidth = 100

// excerpt shows a line with carets below the mistake; at and n are bytes. Both lines begin with indent.
func excerpt(line string, at, n int, indent string) string {
	at = min(max(at, 0), len(line))
	n = min(max(n, 0), len(line)-at)
	before, bad, after := []rune(printable(line[:at])), []rune(printable(line[at:at+n])), []rune(printable(line[at+n:]))
	if len(bad) > excerptWidth/2 {
		bad = append(bad[:excerptWidth/2-1:excerptWidth/2-1], '…')
		after = nil
	}
	if room := excerptWidth - len(bad); len(before) > room*2/3 {
		before = append([]rune{'…'}, before[len(before)-room*2/3:]...)
	}
	if room := excerptWidth - len(bad) - len(before); len(after) > room {
		after = append(after[:room:room], '…')
	}
	return fmt.Sprintf("%s%s%s%s\n%s%s%s", indent, string(before), string(bad), string(after),
		indent, strings.Repeat(" ", len(before)), strings.Repeat("^", max(len(bad), 1)))
}
