-- Lua's patterns, in Lua: string.find, match, gmatch, gsub. The C functions go back over the same bytes for a time that grows without bound
-- with the pattern, where no hook is called, and recurse as deep as a pattern is long. Here the hook is called, and the stack is Lua's.

local fail, string_of, number_of, bad = ...
local byte, char, concat, find_plain, floor, len, max, sub, tostring, type, unpack =
    string.byte, string.char, table.concat, string.find, math.floor, string.len, math.max, string.sub, tostring, type, unpack
local is = string.find

local MOST_CAPTURES = 32
local MOST_COMPARED = 1e7       -- bytes of a search for a plain text, in C, between two calls of the hook
local SPECIAL = "^$*+?.([%-"
local OPEN, PLACE = -1, -2      -- lengths of captures that are none

local CLASSES = {}              -- letter: which bytes
for letter in string.gmatch("acdlpsuwxz", ".") do
    local members = {}
    for c = 0, 255 do members[c] = is(string.char(c), "%" .. letter) ~= nil end
    CLASSES[byte(letter)] = members
end

local function in_class(c, letter)
    local members = CLASSES[letter]
    if members then return members[c] end
    members = CLASSES[letter + 32]              -- a capital letter: all others
    if members and letter >= 65 and letter <= 90 then return not members[c] end
    return letter == c
end

local function class_end(p, at)     -- where what follows the single byte's part of the pattern begins
    local c = byte(p, at)
    at = at + 1
    if c == 37 then                 -- %
        if at > len(p) then fail("malformed pattern (ends with '%')") end
        return at + 1
    end
    if c ~= 91 then return at end   -- [
    if byte(p, at) == 94 then at = at + 1 end
    repeat
        local d = byte(p, at)
        if not d then fail("malformed pattern (missing ']')") end
        at = at + 1
        if d == 37 and at <= len(p) then at = at + 1 end
    until byte(p, at) == 93
    return at + 1
end

local function in_set(c, p, at, stop)       -- at: the [, stop: the ]
    local wanted = true
    at = at + 1
    if byte(p, at) == 94 then
        wanted = false
        at = at + 1
    end
    while at < stop do
        local d = byte(p, at)
        if d == 37 then
            at = at + 1
            if in_class(c, byte(p, at)) then return wanted end
        elseif byte(p, at + 1) == 45 and at + 2 < stop then
            if d <= c and c <= byte(p, at + 2) then return wanted end
            at = at + 2
        elseif d == c then
            return wanted
        end
        at = at + 1
    end
    return not wanted
end

local function one(c, p, at, after)     -- does the byte match the part of the pattern from at to after?
    if not c then return false end
    local d = byte(p, at)
    if d == 46 then return true end
    if d == 37 then return in_class(c, byte(p, at + 1)) end
    if d == 91 then return in_set(c, p, at, after - 1) end
    return d == c
end

local function matcher(s, p)
    local from, size, level = {}, {}, 0     -- of the captures
    local match

    local function greedy(i, at, after)
        local n = 0
        while one(byte(s, i + n), p, at, after) do n = n + 1 end
        while n >= 0 do
            local stop = match(i + n, after + 1)
            if stop then return stop end
            n = n - 1
        end
    end

    local function lazy(i, at, after)
        while true do
            local stop = match(i, after + 1)
            if stop then return stop end
            if not one(byte(s, i), p, at, after) then return nil end
            i = i + 1
        end
    end

    local function open(i, at, what)
        if level >= MOST_CAPTURES then fail("too many captures") end
        level = level + 1
        from[level], size[level] = i, what
        local stop = match(i, at)
        if not stop then level = level - 1 end
        return stop
    end

    local function close(i, at)
        for n = level, 1, -1 do
            if size[n] == OPEN then
                size[n] = i - from[n]
                local stop = match(i, at)
                if not stop then size[n] = OPEN end
                return stop
            end
        end
        fail("invalid pattern capture")
    end

    local function balanced(i, at)
        local begins, ends = byte(p, at), byte(p, at + 1)
        if not ends then fail("unbalanced pattern") end
        if byte(s, i) ~= begins then return nil end
        local depth = 1
        while true do
            i = i + 1
            local c = byte(s, i)
            if not c then return nil end
            if c == ends then
                depth = depth - 1
                if depth == 0 then return i + 1 end
            elseif c == begins then
                depth = depth + 1
            end
        end
    end

    local function again(i, digit)      -- what a capture has taken
        local n = digit - 48
        if n < 1 or n > level or size[n] == OPEN then fail("invalid capture index") end
        local text = sub(s, from[n], from[n] + size[n] - 1)
        if sub(s, i, i + len(text) - 1) == text then return i + len(text) end
    end

    function match(i, at)       -- the place behind what matches from i on; nil: nothing does
        while true do
            local c = byte(p, at)
            if not c then return i end
            local d = byte(p, at + 1)
            if c == 40 then             -- (
                if d == 41 then return open(i, at + 2, PLACE) end
                return open(i, at + 1, OPEN)
            elseif c == 41 then         -- )
                return close(i, at + 1)
            elseif c == 37 and d == 98 then     -- %b
                i = balanced(i, at + 2)
                if not i then return nil end
                at = at + 4
            elseif c == 37 and d == 102 then    -- %f
                at = at + 2
                if byte(p, at) ~= 91 then fail("missing '[' after '%f' in pattern") end
                local after = class_end(p, at)
                local before = i > 1 and byte(s, i - 1) or 0
                if in_set(before, p, at, after - 1) or not in_set(byte(s, i) or 0, p, at, after - 1) then return nil end
                at = after
            elseif c == 37 and d and d >= 48 and d <= 57 then
                i = again(i, d)
                if not i then return nil end
                at = at + 2
            elseif c == 36 and not d then       -- $ at the end
                return i == len(s) + 1 and i or nil
            else
                local after = class_end(p, at)
                local how = byte(p, after)
                if how == 63 then               -- ?
                    if one(byte(s, i), p, at, after) then
                        local stop = match(i + 1, after + 1)
                        if stop then return stop end
                    end
                    at = after + 1
                elseif how == 42 then           -- *
                    return greedy(i, at, after)
                elseif how == 43 then           -- +
                    if not one(byte(s, i), p, at, after) then return nil end
                    return greedy(i + 1, at, after)
                elseif how == 45 then           -- -
                    return lazy(i, at, after)
                else
                    if not one(byte(s, i), p, at, after) then return nil end
                    i, at = i + 1, after
                end
            end
        end
    end

    local function begin(i, at)
        level = 0
        return match(i, at)
    end

    local function capture(n, i, stop)
        if n > level then
            if n ~= 1 then fail("invalid capture index") end
            return sub(s, i, stop - 1)
        end
        if size[n] == PLACE then return from[n] end
        if size[n] == OPEN then fail("unfinished capture") end
        return sub(s, from[n], from[n] + size[n] - 1)
    end

    local function captures(i, stop)    -- all; the whole of what matched if there are none and i is given
        local n = (level == 0 and i) and 1 or level
        local found = {}
        for k = 1, n do found[k] = capture(k, i, stop) end
        return unpack(found, 1, n)
    end

    return begin, captures, capture
end

local function pattern_of(value, name)      -- up to a zero byte, which ends it
    local p = string_of(value, 2, name)
    local zero = find_plain(p, "\0", 1, true)
    return zero and sub(p, 1, zero - 1) or p, p
end

local function is_plain(p)
    for i = 1, len(SPECIAL) do
        if find_plain(p, sub(SPECIAL, i, i), 1, true) then return false end
    end
    return true
end

local function find_in_pieces(s, p, init)
    local size = len(p)
    if (len(s) - init) * size <= MOST_COMPARED then return find_plain(s, p, init, true) end
    local step = max(1, floor(MOST_COMPARED / size))
    for at = init, len(s) - size + 1, step do
        local from, to = find_plain(sub(s, at, at + step + size - 2), p, 1, true)
        if from then return from + at - 1, to + at - 1 end
    end
    return nil
end

local function parts_of(by)     -- what takes the place of a match: texts, and numbers of captures
    local parts, at = {}, 1
    while true do
        local stop = find_plain(by, "%", at, true)
        if not stop then break end
        local c = byte(by, stop + 1)
        parts[#parts + 1] = sub(by, at, stop - 1)
        parts[#parts + 1] = c and (c >= 48 and c <= 57 and c - 48 or char(c)) or nil
        at = stop + 2
    end
    parts[#parts + 1] = sub(by, at)
    return parts
end

local function search(s, p, init, plain, name)
    s = string_of(s, 1, name, p ~= nil)
    local whole
    p, whole = pattern_of(p, name)
    init = init == nil and 1 or floor(number_of(init, 3, name))
    if init < 0 then init = init + len(s) + 1 end
    if init < 1 then init = 1 elseif init > len(s) + 1 then init = len(s) + 1 end
    if name == "find" and (plain or is_plain(p)) then return find_in_pieces(s, whole, init) end
    local begin, captures = matcher(s, p)
    local anchored = byte(p, 1) == 94
    for i = init, anchored and init or len(s) + 1 do
        local stop = begin(i, anchored and 2 or 1)
        if stop then
            if name == "find" then return i, stop - 1, captures() end
            return captures(i, stop)
        end
    end
    return nil
end

local patterns = {}

function patterns.find(s, p, init, plain)
    return search(s, p, init, plain, "find")
end

function patterns.match(s, p, init)
    return search(s, p, init, false, "match")
end

function patterns.gmatch(s, p)
    s, p = string_of(s, 1, "gmatch", p ~= nil), pattern_of(p, "gmatch")
    local begin, captures = matcher(s, p)
    local at = 1
    return function()
        for i = at, len(s) + 1 do
            local stop = begin(i, 1)
            if stop then
                at = stop == i and stop + 1 or stop
                return captures(i, stop)
            end
        end
        at = len(s) + 2
        return nil
    end
end

function patterns.gsub(s, p, by, most)
    s, p = string_of(s, 1, "gsub", p ~= nil), pattern_of(p, "gsub")
    local kind = type(by)
    if kind == "number" then by, kind = tostring(by), "string" end
    if kind ~= "string" and kind ~= "table" and kind ~= "function" then bad(3, "gsub", "string/function/table expected") end
    most = most == nil and len(s) + 1 or number_of(most, 4, "gsub")
    local begin, captures, capture = matcher(s, p)
    local anchored = byte(p, 1) == 94
    local parts = kind == "string" and parts_of(by)
    local out, i, n = {}, 1, 0
    while n < most do
        local stop = begin(i, anchored and 2 or 1)
        if stop then
            n = n + 1
            local value
            if kind == "string" then
                value = by
                if #parts > 1 then
                    local texts = {}
                    for k = 1, #parts do
                        local part = parts[k]
                        texts[k] = type(part) == "string" and part or part == 0 and sub(s, i, stop - 1) or tostring(capture(part, i, stop))
                    end
                    value = concat(texts)
                end
            elseif kind == "table" then
                value = by[capture(1, i, stop)]
            else
                value = by(captures(i, stop))
            end
            if not value then
                value = sub(s, i, stop - 1)
            elseif type(value) ~= "string" and type(value) ~= "number" then
                fail("invalid replacement value (a " .. type(value) .. ")")
            end
            out[#out + 1] = value
        end
        if stop and stop > i then
            i = stop
        elseif i <= len(s) then
            out[#out + 1] = sub(s, i, i)
            i = i + 1
        else
            break
        end
        if anchored then break end
    end
    out[#out + 1] = sub(s, i)
    return concat(out), n
end

return patterns
