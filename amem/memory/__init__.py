"""What is remembered, as text: store, recall, sessions, prompt planning. Knows no tensor."""
