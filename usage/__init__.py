"""Usage tracking: events of model calls, their recorder, analytics, prices, budgets and exports."""
