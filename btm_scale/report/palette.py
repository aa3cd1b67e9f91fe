"""The page's colours, each for light and for dark paper."""

# The series' colours follow Okabe and Ito's palette, which people with any kind of colour blindness can tell apart;
# each has a lighter twin for dark paper.
PALETTE: dict[str, tuple[str, str]] = {
    "paper": ("#fdfcf9", "#15171a"),
    "ink": ("#1c1e21", "#e8e6e1"),
    "soft": ("#5d636b", "#a0a6ad"),
    "faint": ("#e6e3db", "#2f3338"),
    "wash": ("#f4f1ea", "#1d2024"),
    "accent": ("#0b5fa5", "#6db6f2"),
    "heat": ("#0b5fa4", "#1f6fb5"),  # dark enough for white numbers
    "warm": ("#b4531a", "#f0965a"),
    "c0": ("#0072b2", "#56a8e0"),
    "c1": ("#d55e00", "#f08a45"),
    "c2": ("#009e73", "#3cc79a"),
    "c3": ("#b45a92", "#e19ac1"),
    "c4": ("#3a9bd9", "#8fd0f5"),
    "c5": ("#c98500", "#e6b23c"),
    "c6": ("#6a51a3", "#ab98e0"),
    "c7": ("#7f6a2e", "#c4b078"),
}
