-- JSON, as the library cjson of Redis reads and writes it: cjson.encode, cjson.decode, cjson.null.

local fail, bad, string_of, replaced = ...
local byte, char, concat, find, floor, format, huge, len, min, next, rawget, sub, tonumber, type =
    string.byte, string.char, table.concat, string.find, math.floor, string.format, math.huge, string.len, math.min, next, rawget, string.sub, tonumber,
    type

local MOST_NESTED = 1000
local PIECE = 65536         -- bytes that are looked at, in C, between two calls of the hook
local null = newproxy()

local ESCAPES = {['"'] = '\\"', ["\\"] = "\\\\", ["/"] = "\\/", ["\b"] = "\\b", ["\t"] = "\\t", ["\n"] = "\\n", ["\f"] = "\\f", ["\r"] = "\\r"}
for c = 0, 31 do ESCAPES[char(c)] = ESCAPES[char(c)] or format("\\u%04x", c) end
ESCAPES["\127"] = "\\u007f"

-- ---- encode -----------------------------------------------------------------------------------------------------------------------------

local function quoted(text)
    return '"' .. replaced(text, '[%c"\\/]', ESCAPES) .. '"'
end

local function number(n)
    if n ~= n or n == huge or n == -huge then fail("Cannot serialise number: must not be NaN or Inf") end
    return format("%.14g", n)
end

local function length_of(t)     -- of an array; nil: it is an object
    local n, most = 0, 0
    for key in next, t do
        if type(key) ~= "number" or key < 1 or key ~= floor(key) then return nil end
        n = n + 1
        if key > most then most = key end
    end
    if most > 10 and most > 2 * n then fail("Cannot serialise table: excessively sparse array") end
    return n > 0 and most or nil
end

local function put(out, value, depth)
    local kind = type(value)
    if kind == "string" then
        out[#out + 1] = quoted(value)
    elseif kind == "number" then
        out[#out + 1] = number(value)
    elseif kind == "boolean" then
        out[#out + 1] = value and "true" or "false"
    elseif value == nil or value == null then
        out[#out + 1] = "null"
    elseif kind ~= "table" then
        fail("Cannot serialise " .. kind .. ": type not supported")
    else
        if depth >= MOST_NESTED then fail("Cannot serialise, excessive nesting (" .. depth + 1 .. ")") end
        local n = length_of(value)
        out[#out + 1] = n and "[" or "{"
        if n then
            for i = 1, n do
                if i > 1 then out[#out + 1] = "," end
                put(out, rawget(value, i), depth + 1)
            end
        else
            local first = true
            for key, each in next, value do
                if not first then out[#out + 1] = "," end
                first = false
                if type(key) == "number" then
                    out[#out + 1] = '"' .. number(key) .. '"'
                elseif type(key) == "string" then
                    out[#out + 1] = quoted(key)
                else
                    fail("Cannot serialise " .. type(key) .. ": table key must be a number or string")
                end
                out[#out + 1] = ":"
                put(out, each, depth + 1)
            end
        end
        out[#out + 1] = n and "]" or "}"
    end
end

-- ---- decode -----------------------------------------------------------------------------------------------------------------------------

local PUNCTUATION = {["{"] = "T_OBJ_BEGIN", ["}"] = "T_OBJ_END", ["["] = "T_ARR_BEGIN", ["]"] = "T_ARR_END", [":"] = "T_COLON", [","] = "T_COMMA"}
local PLAIN = {['"'] = '"', ["\\"] = "\\", ["/"] = "/", b = "\b", f = "\f", n = "\n", r = "\r", t = "\t"}

local function utf8(n)
    if n < 128 then return char(n) end
    if n < 2048 then return char(192 + floor(n / 64), 128 + n % 64) end
    if n < 65536 then return char(224 + floor(n / 4096), 128 + floor(n / 64) % 64, 128 + n % 64) end
    return char(240 + floor(n / 262144), 128 + floor(n / 4096) % 64, 128 + floor(n / 64) % 64, 128 + n % 64)
end

local function hex_at(s, at)
    local digits = sub(s, at, at + 3)
    return find(digits, "^%x%x%x%x$") and tonumber(digits, 16)
end

local function special_at(s, at, to)    -- where the first byte is, up to `to`, that a string does not have as it is
    local size = 64         -- of a piece: they grow, for most strings are short, and may have many such bytes
    while to - at > PIECE do
        local found = find(sub(s, at, at + size - 1), '[%z\1-\31"\\]')
        if found then return at + found - 1 end
        at, size = at + size, min(2 * size, PIECE)
    end
    return find(s, '[%z\1-\31"\\]', at)
end

local function string_at(s, at)     -- at: behind the quote. The text and the place behind it; nil, what is wrong, where
    local parts, quote = {}, 0
    while true do
        if quote < at then quote = find(s, '"', at, true) or len(s) + 1 end
        local stop = special_at(s, at, quote)
        if not stop then return nil, "unexpected end of string", len(s) + 1 end
        parts[#parts + 1] = sub(s, at, stop - 1)
        local c = sub(s, stop, stop)
        if c == '"' then return concat(parts), stop + 1 end
        if c ~= "\\" then return nil, "invalid token", stop end
        local what = sub(s, stop + 1, stop + 1)
        at = stop + 2
        if PLAIN[what] then
            parts[#parts + 1] = PLAIN[what]
        elseif what == "u" then
            local n = hex_at(s, at)
            at = at + 4
            if n and n >= 0xD800 and n < 0xDC00 then
                local low = sub(s, at, at + 1) == "\\u" and hex_at(s, at + 2)
                n = low and low >= 0xDC00 and low < 0xE000 and 0x10000 + (n - 0xD800) * 1024 + low - 0xDC00
                at = at + 6
            elseif n and n >= 0xDC00 and n < 0xE000 then
                n = nil
            end
            if not n then return nil, "invalid unicode escape code", stop end
            parts[#parts + 1] = utf8(n)
        else
            return nil, "invalid escape code", stop
        end
    end
end

local function token(s, at)     -- its kind, its value, where it begins, the place behind it
    local c = byte(s, at)
    while c == 32 or c == 9 or c == 13 or c == 10 do
        at = at + 1
        c = byte(s, at)
    end
    if not c then return "T_END", nil, len(s) + 1, len(s) + 1 end
    c = char(c)
    if PUNCTUATION[c] then return PUNCTUATION[c], nil, at, at + 1 end
    if c == '"' then
        local text, after, wrong_at = string_at(s, at + 1)
        if not text then return after, nil, wrong_at end
        return "T_STRING", text, at, after
    end
    local word = sub(s, at, at + 4)
    if find(word, "^true") then return "T_BOOLEAN", true, at, at + 4 end
    if word == "false" then return "T_BOOLEAN", false, at, at + 5 end
    if find(word, "^null") then return "T_NULL", null, at, at + 4 end
    local _, stop = find(s, "^-?0[xX]%x+", at)
    if not stop then
        _, stop = find(s, "^-?%d+%.?%d*", at)
        if not stop then _, stop = find(s, "^-?%.%d+", at) end
        if stop then
            local _, more = find(s, "^[eE][+-]?%d+", stop + 1)
            stop = more or stop
        else
            _, stop = find(s, "^-?[iI][nN][fF]", at)
            if stop then
                local _, more = find(s, "^[iI][nN][iI][tT][yY]", stop + 1)
                return "T_NUMBER", c == "-" and -huge or huge, at, (more or stop) + 1
            end
            _, stop = find(s, "^-?[nN][aA][nN]", at)
            if stop then return "T_NUMBER", huge - huge, at, stop + 1 end
        end
    end
    local n = stop and tonumber(sub(s, at, stop))
    if not n then return "invalid token", nil, at end
    return "T_NUMBER", n, at, stop + 1
end

local function wanted(what, kind, at)
    fail("Expected " .. what .. " but found " .. kind .. " at character " .. at)
end

local value_of

local function object(s, at, depth)
    local found = {}
    local kind, value, here, after = token(s, at)
    if kind == "T_OBJ_END" then return found, after end
    while true do
        if kind ~= "T_STRING" then wanted("object key string", kind, here) end
        local key = value
        kind, value, here, after = token(s, after)
        if kind ~= "T_COLON" then wanted("colon", kind, here) end
        found[key], after = value_of(s, depth, token(s, after))
        kind, value, here, after = token(s, after)
        if kind == "T_OBJ_END" then return found, after end
        if kind ~= "T_COMMA" then wanted("comma or object end", kind, here) end
        kind, value, here, after = token(s, after)
    end
end

local function array(s, at, depth)
    local found, n = {}, 0
    local kind, value, here, after = token(s, at)
    if kind == "T_ARR_END" then return found, after end
    while true do
        n = n + 1
        found[n], after = value_of(s, depth, kind, value, here, after)
        kind, value, here, after = token(s, after)
        if kind == "T_ARR_END" then return found, after end
        if kind ~= "T_COMMA" then wanted("comma or array end", kind, here) end
        kind, value, here, after = token(s, after)
    end
end

function value_of(s, depth, kind, value, at, after)
    if kind == "T_STRING" or kind == "T_NUMBER" or kind == "T_BOOLEAN" or kind == "T_NULL" then return value, after end
    if kind ~= "T_OBJ_BEGIN" and kind ~= "T_ARR_BEGIN" then wanted("value", kind, at) end
    if depth >= MOST_NESTED then fail("Found too many nested data structures (" .. depth + 1 .. ") at character " .. at) end
    if kind == "T_OBJ_BEGIN" then return object(s, after, depth + 1) end
    return array(s, after, depth + 1)
end

local function one_argument(name, ...)
    if select("#", ...) ~= 1 then bad(1, name, "expected 1 argument") end
end

return {
    null = null,
    encode = function(...)
        one_argument("encode", ...)
        local out = {}
        put(out, (...), 0)
        return concat(out)
    end,
    decode = function(...)
        one_argument("decode", ...)
        local s = string_of((...), 1, "decode")
        local value, after = value_of(s, 0, token(s, 1))
        local kind, _, at = token(s, after)
        if kind ~= "T_END" then wanted("the end", kind, at) end
        return value
    end,
}
