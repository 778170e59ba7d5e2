-- The server's time.
-- KEYS: none are declared; one server holds them all (prelude.lua names them)
-- ARGV: none
return now_ms()
