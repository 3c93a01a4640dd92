"""What grows: expert banks, routers, route plans, surgery on the module tree, the parameter ledger."""
